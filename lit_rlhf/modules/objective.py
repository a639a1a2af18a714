"""What the task stream of PPO rewards: reward models, closeness to the reference, or both.

Legend: B responses. Every objective gets the KL penalty on top, token by token; constraints are streams of their own.
To add one: a class here and a row in `tests/modules/test_objective.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlhf.functional.shaping import satisficing
from lit_rlhf.types import UserError


class Objective(ABC):
    """Makes the task's score of all rewards' scores; children are frozen and state `names` and `combine`."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the rewards that the objective names; empty where it takes all or none."""

    @abstractmethod
    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Combine scores, name to [B], to [B]."""

    def check(self, rewards: Sequence[str]) -> None:
        """Refuse names that are no rewards of this run.

        Raises:
            UserError: naming them and those there are.
        """
        unknown = [name for name in self.names() if name not in rewards]
        if unknown:
            raise UserError(
                f"{type(self).__name__} names {', '.join(map(repr, unknown))}; the rewards are {', '.join(rewards)}"
            )


@dataclass(frozen=True)
class WeightedReward(Objective):
    """Weighted sum of rewards, sum_i weights_i r_i: plain PPO with one, All-PPO's task with several.

    Args:
        weights: name to weight, any finite number; rewards that are not named do not count. None weighs all by 1.
    """

    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if self.weights is not None:
            _check_weights("WeightedReward", self.weights)

    def names(self) -> Sequence[str]:
        """Return the weighted rewards."""
        return list(self.weights or {})

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, [B]."""
        weights = dict.fromkeys(scores, 1.0) if self.weights is None else self.weights
        return torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(0)


@dataclass(frozen=True)
class NegativeKL(Objective):
    """No reward at all: the task is to stay close to the reference, and reward models act through constraints.

    The task of mu- and xi-PPO (Moskovitz et al. 2023, arXiv:2310.04373); the KL coefficient must be > 0.
    """

    def names(self) -> Sequence[str]:
        """Return no names."""
        return []

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return zeros, [B]."""
        return torch.zeros_like(next(iter(scores.values())))


@dataclass(frozen=True)
class Satisficing(Objective):
    """Closeness to thresholds, - sum_i weights_i (r_i - thresholds_i)^2: PPO-SAT (arXiv:2310.04373).

    Departure from the authors' code: the weight stands outside the square.

    Args:
        thresholds: name to the value aimed at, in the run's `units`.
        weights: name to weight, >= 0; None weighs all by 1.
    """

    thresholds: dict[str, float]
    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if not self.thresholds or not all(math.isfinite(value) for value in self.thresholds.values()):
            raise UserError(f"Satisficing: thresholds must give finite numbers by name, got {self.thresholds!r}")
        if self.weights is not None:
            _check_weights("Satisficing", self.weights)
            if self.weights.keys() != self.thresholds.keys() or min(self.weights.values()) < 0:
                raise UserError(
                    f"Satisficing: weights must be >= 0 and for {', '.join(self.thresholds)}, got {self.weights!r}"
                )

    def names(self) -> Sequence[str]:
        """Return the rewards with a threshold."""
        return list(self.thresholds)

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return minus the weighted squared distances, [B]."""
        weights = dict.fromkeys(self.thresholds, 1.0) if self.weights is None else self.weights
        return satisficing(scores, self.thresholds, weights)


def _check_weights(kind: str, weights: Mapping[str, float]) -> None:
    if not weights or not all(math.isfinite(weight) for weight in weights.values()):
        raise UserError(f"{kind}: weights must give one finite number or more by name, got {dict(weights)!r}")
