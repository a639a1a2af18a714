"""The dual variables of a run's constraints: named, in the checkpoint, stepped once per update.

Legend: C constraints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from lit_rlhf.functional.constrained import (
    AtMost,
    Constraint,
    Form,
    mixed_advantage,
    multiplier_gradient,
    reward_minus_cost,
    squash,
)
from lit_rlhf.functional.control import MomentumSGD, MultiplierControl
from lit_rlhf.types import UserError


class Kept(nn.Module):
    """A module of plain numbers that move between devices and never change their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let `.to` and `.half` move, not round: a multiplier in 16 bits would stand still."""
        return super()._apply(lambda x: x.to(fn(x).device), recurse)


@dataclass(frozen=True)
class Dual:
    """How multipliers move and what they weigh.

    Args:
        control: steps the multipliers; SGD with momentum when left out.
        form: "mixed": A = (C - sum w) A_task + sum w sign A_i, each stream standardised first (arXiv:2310.04373).
            "reward_minus_cost": A = (A_task - lambda A_cost) / (1 + lambda), lambda = exp(multiplier), for one `AtMost`
            constraint (Dai et al. 2023, arXiv:2310.12773).
        init: multipliers at the start.
        every: step after each "rollout", or after each "minibatch" on its rows, as the papers' code does.
        per: value of a constraint as the mean over episodes, or "token": long responses count more.
        average_iterates: weigh by the mean of all multipliers so far; descent-ascent converges in the mean.
    """

    control: MultiplierControl | None = None
    form: Form = "mixed"
    init: float = 0.0
    every: Literal["rollout", "minibatch"] = "rollout"
    per: Literal["episode", "token"] = "episode"
    average_iterates: bool = False

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if not math.isfinite(self.init):
            raise UserError(f"dual.init must be finite, got {self.init}")


class Multipliers(Kept):
    """One multiplier a constraint, with its control's memory, as buffers that carry the constraint's name.

    Args:
        constraints: with different names.
        dual: how they move.

    Attributes:
        constraints: name to constraint, in order; `set_thresholds` replaces them.

    Raises:
        UserError: two constraints of one name, a name with a dot, or constraints that the form cannot take.
    """

    def __init__(self, constraints: Sequence[Constraint], dual: Dual) -> None:
        super().__init__()
        self.steps: Tensor
        self.constraints = {constraint.name: constraint for constraint in constraints}
        self.dual, self.control = dual, dual.control or MomentumSGD()
        names = [constraint.name for constraint in constraints]
        if len(self.constraints) < len(names) or any("." in name or not name for name in names):
            raise UserError(f"constraints need different names without dots, got {names}")
        if dual.form == "reward_minus_cost" and not (len(names) == 1 and isinstance(constraints[0], AtMost)):
            raise UserError(f"dual.form reward_minus_cost takes one constraint, an AtMost; got {list(constraints)!r}")
        for name in names:
            self._keep(name, "multiplier", torch.tensor(float(dual.init)))
            self._keep(name, "memory", torch.zeros(self.control.memory_size))
            self._keep(name, "sum", torch.tensor(0.0))
            self._keep(name, "value", torch.tensor(math.nan))
        self.register_buffer("steps", torch.tensor(0))

    def __len__(self) -> int:
        return len(self.constraints)

    @property
    def values(self) -> dict[str, float]:
        """The constraints' last measured values by name, in the run's units; NaN before the first."""
        return {name: float(self._get(name, "value")) for name in self.constraints}

    def current(self) -> Tensor:
        """Return the multipliers before squashing, [C]: the last ones, or their mean where that was asked for."""
        if self.dual.average_iterates and self.steps > 0:
            return self._column("sum") / self.steps
        return self._column("multiplier")

    def weights(self) -> Tensor:
        """Return what the multipliers weigh, [C]: squashed by each constraint, or exp(multiplier)."""
        if not self.constraints:
            return self.current()
        return squash(list(self.constraints.values()), self.current(), self.dual.form)

    @property
    def task_weight(self) -> float:
        """The task's weight beside them: C - sum of weights, or 1 in the reward-minus-cost form."""
        return 1.0 if self.dual.form == "reward_minus_cost" else len(self) - float(self.weights().sum())

    def mix(self, advantages: Tensor) -> Tensor:
        """Mix the streams' advantages, [B, T, 1 + C], to [B, T]."""
        task, others = advantages[..., 0], advantages[..., 1:]
        if not self.constraints:
            return task
        if self.dual.form == "reward_minus_cost":
            return reward_minus_cost(task, others[..., 0], self.current()[0])
        signs = torch.tensor([c.sign for c in self.constraints.values()], device=task.device)
        return mixed_advantage(task, others, self.weights().to(task.dtype), signs)

    @torch.no_grad()
    def update(self, values: Mapping[str, float]) -> None:
        """Step every multiplier up where its constraint is violated, and down where it has room.

        d multiplier = control of weight'(multiplier) x error, or of the error,    error = sign x (threshold - value)

        Args:
            values: each constraint's mean over the episodes of all processes, in the run's units.
        """
        if not self.constraints:
            return
        kinds = list(self.constraints.values())
        multipliers, found = self._column("multiplier"), [values[c.name] for c in kinds]
        if self.control.reads_error:
            ascent = multipliers.new_tensor([c.error(value) for c, value in zip(kinds, found, strict=True)])
        else:
            ascent = multiplier_gradient(kinds, multipliers, found, self.dual.form)
        memory = torch.stack([self._get(name, "memory") for name in self.constraints])
        multipliers, memory = self.control.step(multipliers, memory, ascent)
        self.steps += 1
        for row, name in enumerate(self.constraints):
            self._get(name, "multiplier").copy_(multipliers[row])
            self._get(name, "memory").copy_(memory[row])
            self._get(name, "sum").add_(multipliers[row])
            self._get(name, "value").fill_(values[name])

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Aim elsewhere from now on; names that are not given stay."""
        for name, threshold in thresholds.items():
            self.constraints[name] = replace(self.constraints[name], threshold=threshold)

    def report(self) -> dict[str, dict[str, float]]:
        """Return value, threshold, multiplier (before squashing) and weight of each constraint by name."""
        weights, found = self.weights().tolist(), {}
        for (name, constraint), weight in zip(self.constraints.items(), weights, strict=True):
            found[name] = {
                "value": float(self._get(name, "value")),
                "threshold": float(constraint.threshold),
                "multiplier": float(self._get(name, "multiplier")),
                "weight": weight,
            }
        return found

    def metrics(self) -> dict[str, float]:
        """Return what is logged under `constraint/NAME/...`."""
        found: dict[str, float] = {}
        for name, entry in self.report().items():
            row = entry | {
                "violation": self.constraints[name].violation(entry["value"]),
                "at_bound": float(self.control.at_bound(self._get(name, "multiplier"))),
            }
            found |= {f"constraint/{name}/{key}": value for key, value in row.items()}
        return found | ({"objective/task_weight": self.task_weight} if found else {})

    def _keep(self, name: str, what: str, value: Tensor) -> None:
        self.register_buffer(f"{name}/{what}", value)

    def _get(self, name: str, what: str) -> Tensor:
        return self.get_buffer(f"{name}/{what}")

    def _column(self, what: str) -> Tensor:
        rows = [self._get(name, what) for name in self.constraints]
        return torch.stack(rows) if rows else torch.zeros(0)
