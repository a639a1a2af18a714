"""Ways to make one reward of the scores of K reward models.

Legend: B responses, K members. To add one: a class here, and a row in the table of
`tests/functional/test_aggregation.py`.
Source of the first three: Coste et al. 2023, arXiv:2310.02743.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.functional.sequence import widen


class RewardAggregator(ABC):
    """Makes one score a response of K members' scores; children are frozen and state only `combine`."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Combine scores [B, K] to [B].

        Raises:
            UserError: there are no members, or too few for the aggregator.
            ValueError: the scores are not [B, K].
        """
        if scores.ndim != 2:
            raise ValueError(f"scores must have shape [B, K], got {tuple(scores.shape)}")
        if scores.shape[1] == 0:
            raise UserError("an aggregator needs at least one reward model, got none")
        return self.combine(widen(scores))

    @abstractmethod
    def combine(self, scores: Tensor) -> Tensor:
        """Combine scores [B, K], at least float32 and K >= 1, to [B]."""


@dataclass(frozen=True)
class Mean(RewardAggregator):
    """Mean over members, mean_i r_i."""

    def combine(self, scores: Tensor) -> Tensor:
        """Return the mean, [B]."""
        return scores.mean(1)


@dataclass(frozen=True)
class WorstCase(RewardAggregator):
    """Lowest member, min_i r_i: the paper's WCO.

    Members on different scales make the lowest-scaled one win always; centre them first.
    """

    def combine(self, scores: Tensor) -> Tensor:
        """Return the minimum, [B]."""
        return scores.amin(1)


@dataclass(frozen=True)
class UncertaintyWeighted(RewardAggregator):
    """Mean less the members' variance: the paper's UWO.

    mean_i r_i - coefficient * sum_i (r_i - mean)^2 / (K - ddof)

    The paper means the variance, not the standard deviation, over K; its code has K in best-of-n and K - 1 in PPO.

    Args:
        coefficient: per score unit; >= 0; 0 is exactly the mean. 0.5 in the paper's best-of-n, 0.1 in its PPO.
        ddof: 0 for the population variance, 1 for the sample variance.
    """

    coefficient: float
    ddof: int = 0

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if not 0 <= self.coefficient < math.inf:
            raise UserError(f"UncertaintyWeighted: coefficient must be >= 0 and finite, got {self.coefficient!r}")
        if self.ddof not in (0, 1):
            raise UserError(f"UncertaintyWeighted: ddof must be 0 or 1, got {self.ddof!r}")

    def combine(self, scores: Tensor) -> Tensor:
        """Return mean less weighted variance, [B]."""
        if scores.shape[1] <= self.ddof:
            raise UserError(f"UncertaintyWeighted: ddof {self.ddof} needs more members than {scores.shape[1]}")
        return scores.mean(1) - self.coefficient * scores.var(1, correction=self.ddof)


@dataclass(frozen=True)
class WeightedSum(RewardAggregator):
    """Weighted sum over members, sum_i weights_i * r_i.

    Args:
        weights: one for each member, in the members' order; any finite numbers.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        object.__setattr__(self, "weights", tuple(self.weights))  # configs and checkpoints bring lists
        if not self.weights or not all(math.isfinite(w) for w in self.weights):
            raise UserError(f"WeightedSum: weights must be one finite number a member, got {list(self.weights)!r}")

    def combine(self, scores: Tensor) -> Tensor:
        """Return the weighted sum, [B]."""
        if len(self.weights) != scores.shape[1]:
            raise UserError(f"WeightedSum: {len(self.weights)} weights for {scores.shape[1]} reward models")
        return (scores * scores.new_tensor(self.weights)).sum(1)  # a matrix product may round by batch size
