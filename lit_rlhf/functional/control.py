"""Controllers: how the KL coefficient and the multipliers move from one update to the next.

Frozen options with pure steps; the state (a coefficient; multipliers and their memory) belongs to the module, which
keeps it in the checkpoint. Legend: C constraints, M numbers of memory each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_rlhf.errors import UserError


class KLController(ABC):
    """Sets the weight of the KL penalty; children are frozen dataclasses and state only `next`.

    Attributes:
        coefficient: the first one, reward units per nat.
    """

    coefficient: float

    @abstractmethod
    def next(self, coefficient: float, kl: float) -> float:
        """Return the coefficient of the next update.

        Args:
            coefficient: of this update.
            kl: nats per response, mean over the update's samples on all processes.
        """


@dataclass(frozen=True)
class FixedKL(KLController):
    """The same coefficient throughout.

    Args:
        coefficient: reward units per nat; >= 0.
    """

    coefficient: float

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        _require(0 <= self.coefficient < math.inf, self, "coefficient", ">= 0 and finite")

    def next(self, coefficient: float, kl: float) -> float:  # noqa: ARG002 - the measured KL changes nothing
        """Return the coefficient as it is."""
        return coefficient


@dataclass(frozen=True)
class AdaptiveKL(KLController):
    """Raises the coefficient while the KL is above a target and lowers it below.

    coefficient <- coefficient (1 + gain clip((kl - target) / target, -clip, clip))

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2; Moskovitz et al. 2023, arXiv:2310.04373 (gain 0.1 from
    their code).

    Args:
        coefficient: the first one, reward units per nat; > 0, since 0 could never rise.
        target: nats per response; > 0.
        gain: per update; > 0, with gain * clip < 1.
        clip: of the relative error; > 0.
    """

    coefficient: float
    target: float
    gain: float = 0.1
    clip: float = 0.2

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        _require(0 < self.coefficient < math.inf, self, "coefficient", "> 0 and finite (FixedKL takes 0)")
        _require(0 < self.target < math.inf, self, "target", "> 0 and finite")
        _require(0 < self.clip < math.inf, self, "clip", "> 0 and finite")
        _require(0 < self.gain < 1 / self.clip, self, "gain", f"> 0 and below 1 / clip = {1 / self.clip:g}")

    def next(self, coefficient: float, kl: float) -> float:
        """Return the coefficient, moved by at most gain * clip of itself."""
        error = min(max(kl / self.target - 1, -self.clip), self.clip)
        return coefficient * (1 + self.gain * error)


class MultiplierControl(ABC):
    """Moves the multipliers; children are frozen dataclasses and state only `move`.

    Attributes:
        memory_size: M.
        reads_error: whether `step` wants the constraints' bare errors, or their gradient.
        bound: multipliers stay within +-bound; far out, a squashed weight hardly moves and is slow to come back.
    """

    memory_size: ClassVar[int]
    reads_error: ClassVar[bool] = False
    bound: float

    def step(self, multipliers: Tensor, memory: Tensor, ascent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the multipliers and memory after one update; the arguments are left alone.

        Args:
            multipliers: [C], before squashing.
            memory: [C, M], zeros before the first update.
            ascent: [C], from `multiplier_gradient`, or errors where `reads_error`: positive moves the multiplier up.
        """
        moved, memory = self.move(multipliers, memory, ascent)
        return moved.clamp(-self.bound, self.bound), memory

    @abstractmethod
    def move(self, multipliers: Tensor, memory: Tensor, ascent: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `step` does, before the multipliers are held to their bound."""

    def at_bound(self, multipliers: Tensor) -> Tensor:
        """Say which multipliers are stuck at their bound, [C]; log it, since such a one no longer answers."""
        return multipliers.abs() >= self.bound


@dataclass(frozen=True)
class MomentumSGD(MultiplierControl):
    """Gradient ascent with momentum, as the paper's code has it.

    g <- g min(1, max_norm / |g|),   m <- momentum m + g,   mu <- mu + lr m

    Source: Moskovitz et al. 2023, arXiv:2310.04373 (momentum) and their code (the rest).

    Args:
        lr: > 0.
        momentum: in [0, 1).
        max_norm: of the gradient of all C multipliers together; > 0, .inf for none.
        bound: of every multiplier; > 0. None in the paper.
    """

    memory_size: ClassVar[int] = 1
    lr: float = 0.1
    momentum: float = 0.1
    max_norm: float = 0.5
    bound: float = 5.0

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        _require(0 < self.lr < math.inf, self, "lr", "> 0 and finite")
        _require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        _require(self.max_norm > 0, self, "max_norm", "> 0")
        _require(self.bound > 0, self, "bound", "> 0")

    def move(self, multipliers: Tensor, memory: Tensor, ascent: Tensor) -> tuple[Tensor, Tensor]:
        """Return one step of ascent."""
        norm = torch.linalg.vector_norm(ascent).clamp_min(torch.finfo(ascent.dtype).tiny)
        memory = self.momentum * memory + (ascent * (self.max_norm / norm).clamp_max(1))[:, None]
        return multipliers + self.lr * memory[:, 0], memory


@dataclass(frozen=True)
class PID(MultiplierControl):
    """Proportional, integral and derivative control; the first and the last damp oscillation.

    mu_n = mu_0 + kp e_n + ki sum_{j <= n} e_j + kd (e_n - e_{n-1}),   e = error, 0 before the first

    Source: Stooke et al. 2020, arXiv:2007.03964, algorithm 2. The errors are bare: with the slope of the squash a
    multiplier that moves out would lessen its own push, and swing back though the violation stays.

    Departures: a multiplier may be negative, so nothing is projected; and each step adds the change of the sum above to
    the bounded multiplier, so that the integral does not wind up at the bound.

    Args:
        kp: >= 0.
        ki: >= 0; alone it is ascent along the errors with that step.
        kd: >= 0.
        bound: of every multiplier; > 0.
    """

    memory_size: ClassVar[int] = 2  # the last two errors
    reads_error: ClassVar[bool] = True
    kp: float = 0.1
    ki: float = 0.1
    kd: float = 0.0
    bound: float = 5.0

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        for field in ("kp", "ki", "kd"):
            _require(0 <= getattr(self, field) < math.inf, self, field, ">= 0 and finite")
        _require(self.kp + self.ki + self.kd > 0, self, "ki", "> 0 where kp and kd are 0")
        _require(self.bound > 0, self, "bound", "> 0")

    def move(self, multipliers: Tensor, memory: Tensor, ascent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the multipliers, moved by the change of the three terms."""
        last, before = memory.unbind(1)
        change = self.kp * (ascent - last) + self.ki * ascent + self.kd * (ascent - 2 * last + before)
        return multipliers + change, torch.stack([ascent, last], 1)


def _require(ok: bool, piece: KLController | MultiplierControl, field: str, expected: str) -> None:
    if not ok:
        raise UserError(f"{type(piece).__name__}: {field} must be {expected}, got {getattr(piece, field)!r}")
