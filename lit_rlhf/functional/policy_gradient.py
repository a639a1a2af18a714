"""Policy gradients: KL to the reference, advantages, and the clipped losses of PPO.

Legend: B sequences, T response tokens, S reward streams with one value head each. Masks are True where a token counts.
Losses are summed over tokens, so that the module divides by the token count of the whole minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.functional.sequence import masked_sum, widen
from lit_rlhf.types import LossOutput

MAX_LOG_RATIO = 20.0  # nats; exp of it is 5e8, far beyond any clip range, and float32 overflows at 88


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


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the targets of the values, each stream with its own baseline.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma gae_lambda A_{t+1},   target_t = A_t + V_t

    where V and A after a response's last token are 0: nothing is bootstrapped from the end token's successor or from
    padding, also where the response was cut off by the length limit.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    Args:
        rewards: [B, T] or [B, T, S], r_t is paid for token t.
        values: like `rewards`, V_t is the value of the state before token t.
        mask: [B, T], one run of True a row; what stands outside it, NaN included, does not count.
        gamma: discount a token, in [0, 1].
        gae_lambda: in [0, 1]; 0 is the one-step error, 1 the discounted return less the value.

    Returns:
        advantages and value targets, like `rewards`, 0 outside the mask; not standardised.

    Raises:
        ValueError: the shapes do not fit.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    >>> gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, gae_lambda=1.0)
    (tensor([[0.5000, 0.7500]]), tensor([[1., 1.]]))
    """
    if rewards.shape != values.shape:
        raise ValueError(f"values must have the rewards' shape {tuple(rewards.shape)}, got {tuple(values.shape)}")
    keep = _over_streams(mask, rewards)
    rewards, values = (torch.where(keep, widen(x), 0) for x in (rewards, values))
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = rewards + gamma * after - values
    advantage, reversed_advantages = torch.zeros_like(delta[:, 0]), []
    for t in reversed(range(mask.shape[1])):
        advantage = torch.where(keep[:, t], delta[:, t] + gamma * gae_lambda * advantage, 0)
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    return advantages, advantages + values


def clipped_surrogate(
    logps: Tensor, behaviour_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> LossOutput:
    """PPO's clipped objective as a loss, summed over the tokens of each response.

    loss = -sum_t min(rho_t A_t, clip(rho_t, 1 - clip_range, 1 + clip_range) A_t)
    rho_t = exp(logps_t - behaviour_logps_t)

    At rho = 1 its gradient is that of -sum_t A_t logps_t, the policy gradient.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    Departures: log rho is held to +-20 nats, so that no loss or gradient is infinite.

    Args:
        logps: [B, T], nats, of the policy; the gradient flows through these alone.
        behaviour_logps: [B, T], nats, of the policy that drew the tokens.
        advantages: [B, T], constants here.
        mask: [B, T]; what stands outside it, NaN included, does not count.
        clip_range: half width of the unclipped range of rho; > 0.

    Returns:
        loss [B], and token sums [B]: "ratio" (rho), "clipped" (1 where the clipped term is the smaller one) and
        "approx_kl" ((log rho)^2 / 2 in nats, the k2 estimate of KL(behaviour || policy)).

    Raises:
        ValueError: the shapes do not fit.
    """
    _over_streams(mask, logps)
    log_ratio = torch.where(mask, widen(logps) - widen(behaviour_logps).detach(), 0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain = torch.where(mask, widen(advantages).detach(), 0)
    free, held = ratio * gain, ratio.clamp(1 - clip_range, 1 + clip_range) * gain
    tokens = {"ratio": ratio, "clipped": (held < free).to(ratio.dtype), "approx_kl": log_ratio.square() / 2}
    metrics = {name: masked_sum(value.detach(), mask) for name, value in tokens.items()}
    return LossOutput(-masked_sum(torch.minimum(free, held), mask), metrics)


def clipped_value(
    values: Tensor, old_values: Tensor, targets: Tensor, mask: Tensor, clip_range: float | None
) -> LossOutput:
    """Half the squared error of the values, summed over the tokens of each response.

    loss = 1/2 sum_t max((V_t - target_t)^2, (V'_t - target_t)^2)
    V'_t = V_t held within clip_range of old V_t

    Source: the PPO code of OpenAI's baselines (2017); the paper has no clipping here.

    Args:
        values: [B, T] or [B, T, S], of the critic; the gradient flows through these alone.
        old_values: like `values`, at the time of the rollout.
        targets: like `values`, from `gae`.
        mask: [B, T]; what stands outside it, NaN included, does not count.
        clip_range: in units of the values; > 0, or None for the plain squared error.

    Returns:
        loss [B] or [B, S], and token sums of the same shape: "clipped" (1 where the clipped error is the larger one)
        and "squared_error" ((V - target)^2, unclipped).

    Raises:
        ValueError: the shapes do not fit.
    """
    keep = _over_streams(mask, values)
    values, old_values, targets = (torch.where(keep, widen(x), 0) for x in (values, old_values, targets))
    old_values, targets = old_values.detach(), targets.detach()
    free = (values - targets).square()
    held = free
    if clip_range is not None:
        held = (old_values + (values - old_values).clamp(-clip_range, clip_range) - targets).square()
    metrics = {"clipped": (held > free).to(free.dtype).sum(1), "squared_error": free.sum(1)}
    return LossOutput(torch.maximum(free, held).sum(1) / 2, {name: x.detach() for name, x in metrics.items()})


def _over_streams(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask [B, T] so that it broadcasts over [B, T] or [B, T, S]."""
    if x.ndim not in (2, 3) or mask.shape != x.shape[:2]:
        raise ValueError(
            f"the mask must have shape {tuple(x.shape[:2])} of [B, T] or [B, T, S], got {tuple(mask.shape)}"
        )
    return mask if x.ndim == 2 else mask[..., None]
