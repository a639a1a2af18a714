"""The optimizer and its schedule, as one block of a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lit_rlhf.types import UserError

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def planned_steps(trainer: Any) -> int:
    """Return how many optimizer steps a run will take, from its plan alone.

    Lightning's `estimated_stepping_batches` builds the train loader to count; built before a checkpoint's position is
    restored, that loader would never learn of it, and a run resumed inside an epoch would start the epoch anew.
    A module that takes several steps on one batch says how many by `steps_per_batch`.

    Raises:
        UserError: the run has no end, so no schedule can be laid over it.
    """
    if not hasattr(trainer.datamodule, "loader"):  # somebody else's data
        return int(trainer.estimated_stepping_batches)
    if hasattr(trainer.datamodule, "planned_steps"):  # its epochs differ in length
        total = int(trainer.datamodule.planned_steps)
        return total if trainer.max_steps < 0 else min(total, trainer.max_steps)
    micro_batches = len(trainer.datamodule.loader("train", training=True))
    limit = trainer.limit_train_batches
    micro_batches = min(micro_batches, limit) if isinstance(limit, int) else int(micro_batches * limit)
    epoch = math.ceil(micro_batches / trainer.accumulate_grad_batches)
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    epoch *= getattr(trainer.lightning_module, "steps_per_batch", 1)
    bounds += [trainer.max_epochs * epoch] if (trainer.max_epochs or -1) >= 0 else []
    if not bounds:
        raise UserError("trainer.max_epochs and trainer.max_steps are both -1; expected one of them to end the run")
    return min(bounds)


@dataclass(frozen=True)
class Optimizer:
    """Which optimizer, and how its learning rate moves.

    Args:
        name: "adamw", "adam", "rmsprop" (the DPO authors' choice) or "sgd".
        lr: peak learning rate, > 0.
        weight_decay: decoupled for adamw; >= 0.
        betas: moments of adam and adamw.
        eps: of adam, adamw and rmsprop.
        warmup_ratio: share of all optimizer steps over which the rate climbs linearly from 0; in [0, 1].
        schedule: after the warm-up: "constant", or "linear" or "cosine" down to 0 at the last step.
    """

    name: Literal["adamw", "adam", "rmsprop", "sgd"] = "adamw"
    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_ratio: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        """Raise ValueError naming the field, its range and the value."""
        object.__setattr__(self, "betas", tuple(self.betas))  # a checkpoint gives a list
        if self.name not in KINDS:
            raise ValueError(f"optimizer.name must be one of {', '.join(KINDS)}, got {self.name!r}")
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr must be > 0, got {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay must be >= 0, got {self.weight_decay}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optimizer.warmup_ratio must be in [0, 1], got {self.warmup_ratio}")

    def build(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer over parameters, or over groups of them that may have a rate of their own."""
        extra: dict[str, Any] = {}
        if self.name in ("adamw", "adam"):
            extra["betas"] = self.betas
        if self.name != "sgd":
            extra["eps"] = self.eps
        return KINDS[self.name](parameters, lr=self.lr, weight_decay=self.weight_decay, **extra)

    def schedule_for(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the schedule over `steps` optimizer steps, one tick a step."""
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        warmup = round(self.warmup_ratio * steps)
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
