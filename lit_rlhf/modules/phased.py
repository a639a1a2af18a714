"""Modules that train in phases: each with its own epochs, fresh optimizer state, learning rate, and result on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_rlhf.modules.base import BaseModule
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.types import UserError


class PhasedModule(BaseModule):
    """A module whose data module says which epochs belong to which phase (`epochs`, `phase`, `first_epoch`).

    Args:
        phase: the one to train, or "all" for each in turn.
        lrs: phase to learning rate; `optimizer.lr` for the others.
        base: arguments of `BaseModule`.

    Attributes:
        done: phases that have ended, in this run or in the one it started from.
        current_phase: the one under way; empty outside training.
    """

    def __init__(self, *, phase: str = "all", lrs: dict[str, float] | None = None, **base: Any) -> None:
        super().__init__(**base)
        self.phase, self.lrs = phase, dict(lrs or {})
        self.done: list[str] = []
        self.current_phase = ""

    @abstractmethod
    def enter_phase(self, phase: str) -> None:
        """Set what learns in a phase; also called where a run goes on inside one."""

    @abstractmethod
    def begin_phase(self, phase: str) -> None:
        """Make what a phase starts with of the results of those before; called once a phase."""

    def superseded(self, phase: str) -> set[str]:
        """Return the phases whose results no longer stand once this one begins anew: itself and all that follow."""
        order = list(self.trainer.datamodule.epochs)  # type: ignore[attr-defined]
        return set(order[order.index(phase) :])

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups of all parameters that any phase trains."""

    def plan_phases(self, data: Any) -> None:
        """Let the data module's phases end the run, each with loaders of its own.

        Raises:
            UserError: nothing is left to train.
        """
        if self.phase != "all":
            data.epochs = {name: count if name == self.phase else 0 for name, count in data.epochs.items()}
        total = sum(data.epochs.values())
        if not total:
            raise UserError(f"phase {self.phase!r} has no epochs; expected data.epochs.{self.phase} >= 1")
        given = self.trainer.fit_loop.max_epochs
        self.trainer.fit_loop.max_epochs = total if given in (None, -1) else min(given, total)
        self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if isinstance(self.trainer.strategy, DDPStrategy):  # each phase leaves the others' parameters aside
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # noqa: SLF001

    def on_train_start(self) -> None:
        """Find the phase of a run that goes on where another stopped, perhaps on the last batch of the phase before."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        phase = data.phase(self.current_epoch)
        for before in data.epochs:
            if data.epochs[before] and data.first_epoch(before) < data.first_epoch(phase) and before not in self.done:
                self._end_phase(before)
        self._enter(phase)

    def on_train_epoch_start(self) -> None:
        """Begin a phase in its first epoch, without the optimizer's memory of the one before."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        phase = data.phase(self.current_epoch)
        self._enter(phase)
        if self.current_epoch == data.first_epoch(phase):
            rank_zero_info(f"phase {phase!r} begins")
            self.done = [name for name in self.done if name not in self.superseded(phase)]
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()
            self.begin_phase(phase)

    def on_train_epoch_end(self) -> None:
        """End a phase after its last epoch."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.current_epoch + 1 == data.first_epoch(self.current_phase) + data.epochs[self.current_phase]:
            self._end_phase(self.current_phase)

    def _enter(self, phase: str) -> None:
        self.current_phase = phase
        self.enter_phase(phase)

    def _end_phase(self, phase: str) -> None:
        """Write the result into the run folder, for later runs to start from."""
        self.done = [*self.done, phase]
        if self.trainer.logger is not None and self.trainer.log_dir is not None:
            folder = str(Path(self.trainer.log_dir) / "phases" / phase)
            self.export(folder)
            rank_zero_info(f"phase {phase!r} is done: {folder}")

    def configure_optimizers(self) -> Any:
        """Return one optimizer over all phases' parameters, and the phases' schedules one after the other."""
        groups: Any = self.parameter_groups()
        optimizer = self.optimizer_options.build(groups)
        steps = self.trainer.datamodule.phase_steps()  # type: ignore[attr-defined]
        factor = phase_factor(self.optimizer_options, self.lrs, steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which phases are done."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["phases_done"] = list(self.done)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over which phases are done."""
        super().on_load_checkpoint(checkpoint)
        self.done = list(checkpoint["phases_done"])


def phase_factor(options: Optimizer, lrs: Mapping[str, float], steps: Mapping[str, int]) -> Callable[[int], float]:
    """Return the learning rate of each optimizer step as a multiple of `options.lr`.

    Args:
        options: gives each phase its warm-up and schedule, over the phase's own steps.
        lrs: phase to peak learning rate; `options.lr` for the others.
        steps: phase to its optimizer steps, in order; at least one phase.
    """
    plan: list[tuple[int, float, Callable[[int], float]]] = []
    for phase, count in steps.items():
        dummy = torch.optim.SGD([nn.Parameter(Tensor([0.0]))], lr=1.0)
        schedule: Any = options.schedule_for(dummy, count)
        plan.append((count, lrs.get(phase, options.lr) / options.lr, schedule.lr_lambdas[0]))

    def factor(step: int) -> float:
        for count, scale, shape in plan[:-1]:
            if step < count:
                return scale * shape(step)
            step -= count
        _, scale, shape = plan[-1]
        return scale * shape(step)

    return factor
