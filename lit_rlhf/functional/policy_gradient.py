"""KL between a policy and its reference, estimated on the policy's own samples.

Legend: B sequences, T response tokens. Masks are True where a token counts.
"""

from __future__ import annotations

from torch import Tensor

from lit_rlhf.functional.sequence import masked_sum


def kl_estimates(logps: Tensor, reference_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Three estimates of KL(policy || reference) for each sampled response.

    With u_t = logps_t - reference_logps_t at tokens drawn from the policy, summed over the response tokens:

    k1 = sum_t u_t                    unbiased; single values may be negative
    k2 = sum_t u_t^2 / 2              biased, low variance, near the KL while that is small
    k3 = sum_t exp(-u_t) - 1 + u_t    unbiased, never negative; unreliable at large KL

    Source: J. Schulman, Approximating KL divergence, 2020.

    Departures: k2 and k3 are taken per token and then summed, which differs from taking them of the summed log-ratio.
    The result is float64, because exp overflows float32 beyond 88 nats. These are measurements, no losses: k1 and k3
    differentiated as they stand do not give the gradient of the KL.

    Args:
        logps: [B, T], nats, of the policy at the temperature that drew the tokens.
        reference_logps: [B, T], nats, at the same temperature.
        mask: [B, T], True on response tokens.

    Returns:
        "k1", "k2" and "k3" to [B], nats per response, float64.
    """
    u = logps.double() - reference_logps.double()
    tokens = {"k1": u, "k2": u.square() / 2, "k3": (-u).expm1() + u}
    return {name: masked_sum(value, mask) for name, value in tokens.items()}
