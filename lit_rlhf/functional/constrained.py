"""Constraints on the values of reward streams, and how their multipliers enter a policy's advantage.

Legend: B sequences, T response tokens, C constraints in config order. A value is the mean of a stream over episodes, in
the stream's own units; a multiplier mu is any real number, its weight what remains of it after squashing.
To add a constraint: a class here, and a row in the table of `tests/functional/test_constrained.py`.

The problem: max over policies, min over multipliers, of v_0 + sum_i w_i sign_i (v_i - threshold_i), where v_0 is the
task. Source of all but the reward-minus-cost form: Moskovitz et al. 2023, arXiv:2310.04373.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.functional.sequence import widen

Form = Literal["mixed", "reward_minus_cost"]


@dataclass(frozen=True)
class Constraint(ABC):
    """A threshold for one named reward stream; children state `sign` and `weight`.

    Attributes:
        sign: of the stream's advantage in the mix, +1 or -1.
        name: of the stream.
        threshold: in the stream's own units.
    """

    sign: ClassVar[int]
    name: str
    threshold: float

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if not self.name:
            raise UserError(f"{type(self).__name__}: name must be that of a reward, got {self.name!r}")
        if not math.isfinite(self.threshold):
            raise UserError(f"{type(self).__name__} {self.name}: threshold must be finite, got {self.threshold!r}")

    def error(self, value: float) -> float:
        """Return sign * (threshold - value), which drives the multiplier up."""
        return self.sign * (self.threshold - value)

    def violation(self, value: float) -> float:
        """Return by how much the constraint is broken, >= 0."""
        return max(0.0, self.error(value))

    @abstractmethod
    def weight(self, multiplier: Tensor) -> Tensor:
        """Squash multipliers of any shape to weights."""


class _OneSided:
    """A bound from one side."""

    def weight(self, multiplier: Tensor) -> Tensor:
        """Return sigmoid(mu), in (0, 1)."""
        return multiplier.sigmoid()


@dataclass(frozen=True)
class AtLeast(_OneSided, Constraint):
    """The stream's value should be at or above the threshold (mu-PPO); weight sigmoid(mu).

    Args:
        name: of the stream.
        threshold: in the stream's own units.
    """

    sign: ClassVar[int] = 1


@dataclass(frozen=True)
class AtMost(_OneSided, Constraint):
    """The stream's value should be at or below the threshold (All-PPO); weight sigmoid(mu).

    Args:
        name: of the stream.
        threshold: in the stream's own units.
    """

    sign: ClassVar[int] = -1


@dataclass(frozen=True)
class Equal(Constraint):
    """The stream's value should be at the threshold (xi-PPO); weight tanh(mu), negative to push the value down.

    Args:
        name: of the stream.
        threshold: in the stream's own units.
    """

    sign: ClassVar[int] = 1

    def violation(self, value: float) -> float:
        """Return the distance to the threshold."""
        return abs(self.error(value))

    def weight(self, multiplier: Tensor) -> Tensor:
        """Return tanh(mu), in (-1, 1)."""
        return multiplier.tanh()


def squash(constraints: Sequence[Constraint], multipliers: Tensor, form: Form = "mixed") -> Tensor:
    """Return what multipliers [C] weigh, [C]: each constraint's own squash, or lambda = exp(mu)."""
    if form == "reward_minus_cost":
        return multipliers.exp()
    return torch.stack([c.weight(mu) for c, mu in zip(constraints, multipliers, strict=True)])


def multiplier_gradient(
    constraints: Sequence[Constraint], multipliers: Tensor, values: Sequence[float], form: Form = "mixed"
) -> Tensor:
    """Direction in which multipliers move by ascent: up while a constraint is broken.

    g_i = d/dmu_i sum_j w_j(mu_j) sign_j (threshold_j - value_j)

    For "at least" and "equal" this is minus the gradient of the paper's multiplier loss, sum_i w_i (value_i -
    threshold_i), which it minimises; "at most" turns its sign.

    Args:
        constraints: C of them.
        multipliers: [C].
        values: C means over episodes, over all processes.
        form: decides the squash.

    Returns:
        [C], in the streams' units.
    """
    errors = multipliers.new_tensor([c.error(value) for c, value in zip(constraints, values, strict=True)])
    with torch.enable_grad():
        leaf = multipliers.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad((squash(constraints, leaf, form) * errors).sum(), leaf)
    return gradient


def mixed_advantage(task: Tensor, constraints: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
    """Advantage of the Lagrangian, with the task's weight what the constraints leave of C.

    A = (C - sum_i w_i) A_task + sum_i w_i sign_i A_i

    One active constraint among C therefore weighs at most 1 / (C - 1) times the task (any weight where C = 1).

    Args:
        task: [B, T].
        constraints: [B, T, C].
        weights: [C], squashed.
        signs: [C], +1 or -1.

    Returns:
        [B, T].

    Raises:
        ValueError: the shapes do not fit.
    """
    if constraints.shape[:-1] != task.shape or weights.shape != constraints.shape[-1:] or signs.shape != weights.shape:
        shapes = [tuple(x.shape) for x in (task, constraints, weights, signs)]
        raise ValueError(f"shapes must be [B, T], [B, T, C], [C] and [C], got {shapes}")
    task, constraints = widen(task), widen(constraints)
    weights = weights.to(task.dtype)
    return (len(weights) - weights.sum()) * task + (constraints * (weights * signs)).sum(-1)


def reward_minus_cost(task: Tensor, cost: Tensor, multiplier: Tensor) -> Tensor:
    """Advantage of reward less cost with an exponentiated multiplier, scaled so that the weights sum to 1.

    A = (A_task - lambda A_cost) / (1 + lambda),   lambda = exp(mu)

    Source: Dai et al. 2023, arXiv:2310.12773, eq. 30; lambda moves by eq. 31, `multiplier_gradient` in this form.

    Departures: computed as sigmoid(-mu) A_task - sigmoid(mu) A_cost, in which a large mu does not overflow. The KL
    penalty is not halved between the two: charged to both streams in full (as reward -KL and as cost +KL), its total
    weight is 1 whatever the multiplier.

    Args:
        task: [B, T].
        cost: [B, T], of what should be low.
        multiplier: [], mu.

    Returns:
        [B, T].
    """
    task, cost = widen(task), widen(cost)
    return (-multiplier).sigmoid().to(task.dtype) * task - multiplier.sigmoid().to(task.dtype) * cost


def reached(value: float, threshold: float, start: float, tolerance: float) -> bool:
    """Say whether a value is at its threshold, |value - threshold| <= tolerance * |threshold - start|.

    Args:
        value: mean of the stream now.
        threshold: where it should be.
        start: what it was at step 0.
        tolerance: share of the way from start to threshold; >= 0.
    """
    return abs(value - threshold) <= tolerance * abs(threshold - start)
