"""How the K members of an ensemble differ on the same B responses.

All take standardised scores: on raw ones, offsets and scales between members would pass for disagreement.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.functional.sequence import widen


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


def correlation(sums: Tensor) -> Tensor:
    """Return the mean Pearson correlation over all pairs of members.

    Args:
        sums: from `products`, in float64; K >= 2.

    Returns:
        [], in [-1, 1]; a member that scores everything alike correlates 0 with the others.
    """
    mean = sums[0, 1:] / sums[0, 0]
    covariance = sums[1:, 1:] / sums[0, 0] - mean[:, None] * mean
    std = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.where(std > 0, 1 / std, 0)
    pairs = (covariance * scale[:, None] * scale).triu(1)
    members = len(mean)
    return pairs.sum() / (members * (members - 1) / 2)
