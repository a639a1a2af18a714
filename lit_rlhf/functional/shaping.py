"""Scores of whole responses made into rewards of tokens.

Legend: B sequences, T response tokens. Masks are True where a token counts. All results are constants to the losses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.functional.sequence import widen


def terminal_rewards(score: Tensor, mask: Tensor) -> Tensor:
    """Pay each response's score on its last token: the end token, or the one at which the length limit cut it off.

    Args:
        score: [B].
        mask: [B, T], True on response tokens, the end token included.

    Returns:
        [B, T], in the score's units, 0 elsewhere; a row without tokens is paid nothing.

    Raises:
        ValueError: the shapes do not fit.

    >>> terminal_rewards(torch.tensor([5.0]), torch.tensor([[True, True, False]]))
    tensor([[0., 5., 0.]])
    """
    if score.shape != mask.shape[:1]:
        raise ValueError(f"score must have shape {tuple(mask.shape[:1])}, got {tuple(score.shape)}")
    still_to_come = mask.flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask & (still_to_come == 1), widen(score).detach()[:, None], 0)


def kl_rewards(logps: Tensor, reference_logps: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Charge every token for its log-ratio to the reference, the k1 estimate of KL(policy || reference).

    r_t = -coefficient (logps_t - reference_logps_t)

    Summed over a response and averaged over samples this is -coefficient times the KL, and as a reward it gives that
    KL's gradient, which k1 and k3 differentiated as losses do not.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.

    Args:
        logps: [B, T], nats, of the policy that drew the tokens, at the temperature that drew them.
        reference_logps: [B, T], nats, at the same temperature.
        mask: [B, T]; what stands outside it, NaN included, does not count.
        coefficient: reward units per nat; >= 0.

    Returns:
        [B, T], 0 outside the mask.
    """
    log_ratio = widen(logps).detach() - widen(reference_logps).detach()
    return torch.where(mask, -coefficient * log_ratio, 0)


def penalise_unended(score: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Take `penalty` off the score of every response that the length limit cut off.

    Args:
        score: [B].
        ended: [B], True where the response closed with one of the sampler's stop tokens.
        penalty: in the score's units; >= 0.

    Returns:
        [B].
    """
    return torch.where(ended, widen(score), widen(score) - penalty)


def satisficing(scores: Mapping[str, Tensor], thresholds: Mapping[str, float], weights: Mapping[str, float]) -> Tensor:
    """Reward being at every threshold, neither below nor above: the reward of PPO-SAT.

    -sum_i weights_i (scores_i - thresholds_i)^2

    Source: Moskovitz et al. 2023, arXiv:2310.04373.

    Departures: the authors' code scales each score by its weight before the square; here, as in the paper, the weight
    is outside, so thresholds are in the scores' own units.

    Args:
        scores: name to [B]; those without a threshold do not count.
        thresholds: name to the value to be at, in the score's units.
        weights: name to a weight per squared score unit, >= 0; the names of `thresholds`.

    Returns:
        [B], never above 0.

    Raises:
        UserError: there is no threshold, none of that name among the scores, or weights for other names.

    >>> satisficing({"a": torch.tensor([3.0]), "b": torch.tensor([1.0])}, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 9.0})
    tensor([-2.])
    """
    if not thresholds or not set(thresholds) <= set(scores):
        raise UserError(f"satisficing: thresholds must be of the rewards {sorted(scores)}, got {sorted(thresholds)}")
    if set(weights) != set(thresholds):
        raise UserError(f"satisficing: weights must be of {sorted(thresholds)}, got {sorted(weights)}")
    errors = {name: widen(scores[name]) - threshold for name, threshold in thresholds.items()}
    return -torch.stack([weights[name] * error.square() for name, error in errors.items()]).sum(0)
