"""How the K members of an ensemble differ on the same B responses, and what they say together.

`spread` and `lowest` take standardised scores: on raw ones, offsets and scales between members would pass for
disagreement.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.functional.sequence import widen

FLOOR = 1e-6  # of a spread, in units of the mean where that is above 1; scores are made in float32


def collapsed(mean: Tensor, std: Tensor) -> Tensor:
    """Say which members score everything alike, so that their spread is rounding noise, [K] from [K] and [K].

    >>> collapsed(torch.tensor([0.0, 50.0]), torch.tensor([1e-3, 1e-6])).tolist()
    [False, True]
    """
    return ~(std > FLOOR * mean.abs().clamp_min(1.0))


def mixture_logit(margins: Tensor) -> Tensor:
    """Return the logit of the members' mean probability that `chosen` is the better one.

    p = mean_k sigmoid(margin_k),    logit = log p - log(1 - p)

    The ensemble as a mixture of its members (Lakshminarayanan et al. 2017, arXiv:1612.01474, section 2.4).

    Args:
        margins: [B, K], raw scores of chosen less rejected: each member's own logit.

    Returns:
        [B]; the margin itself for one member.
    """
    margins = widen(margins)
    return logsigmoid(margins).logsumexp(1) - logsigmoid(-margins).logsumexp(1)


def spread(scores: Tensor) -> Tensor:
    """Return the population standard deviation over members, [B] from [B, K]; 0 for one member.

    >>> spread(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist()
    [1.0, 0.0]
    """
    return widen(scores).var(1, correction=0).sqrt()


def lowest(scores: Tensor) -> Tensor:
    """Say which member is the minimum, [B, K] of 0 and 1, ties in equal parts.

    >>> lowest(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    scores = widen(scores)
    least = (scores == scores.amin(1, keepdim=True)).to(scores.dtype)
    return least / least.sum(1, keepdim=True)


def products(scores: Tensor) -> Tensor:
    """Return what `correlation` needs and what adds up over batches and processes.

    Returns:
        [K + 1, K + 1], sum over responses of (1, scores) (1, scores)^T.
    """
    rows = torch.cat([torch.ones_like(scores[:, :1]), scores], 1)
    return rows.T @ rows


def correlation(sums: Tensor) -> Tensor | None:
    """Return the mean Pearson correlation over all pairs of members.

    Args:
        sums: from `products`, in float64; K >= 2.

    Returns:
        [], in [-1, 1]; None where a member scores everything alike, since it correlates with nothing.
    """
    mean = sums[0, 1:] / sums[0, 0]
    covariance = sums[1:, 1:] / sums[0, 0] - mean[:, None] * mean
    std = covariance.diagonal().clamp_min(0).sqrt()
    if collapsed(mean, std).any():
        return None
    pairs = (covariance / std[:, None] / std).triu(1)
    members = len(mean)
    return pairs.sum() / (members * (members - 1) / 2)
