"""Keeps the checkpoint at the gold peak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class PeakCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` on `gold/score` that also serves runs without a gold reward.

    Where nothing logs the monitored value (own data, no gold scorer configured) it keeps the latest checkpoint and says
    so once; Lightning's own class would stop the run.

    Args:
        every_n_steps: optimizer steps between saves; use the probe's interval, so that the value is fresh.
        monitor: the logged value to maximise.
        save_top_k: how many checkpoints to keep.
    """

    def __init__(self, every_n_steps: int, monitor: str = "gold/score", save_top_k: int = 1) -> None:
        super().__init__(
            filename="peak-{step}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode="max",
            save_top_k=save_top_k,
            save_last=True,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,  # one last.ckpt, also after a second resume
        )
        self._counted = 0

    @property
    def state_key(self) -> str:
        """Name the saved state; not by the monitor, which a run without gold gives up."""
        return self._generate_state_key(every_n_train_steps=self._every_n_train_steps, save_top_k=self.save_top_k)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run starts or goes on."""
        super().on_train_start(trainer, pl_module)
        self._counted = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save as Lightning does; give up the monitor where nothing has logged it by the first save.

        Where the module steps its optimizer itself, several times a batch, a save is due whenever a multiple of the
        interval was passed; Lightning would wait for an exact one.
        """
        due = trainer.global_step // self._every_n_train_steps > self._counted // self._every_n_train_steps
        self._counted = trainer.global_step
        if self.monitor is not None and due and self.monitor not in trainer.callback_metrics:
            rank_zero_info(f"No {self.monitor!r} is logged in this run: the latest checkpoint is kept, not the peak's.")
            self.monitor = None
        if pl_module.automatic_optimization:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        elif due and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See to it that `last.ckpt` is the last step's, also where the run ended between two saves."""
        if self.dirpath is not None and self._last_global_step_saved != trainer.global_step:
            trainer.save_checkpoint(str(Path(self.dirpath) / "last.ckpt"))
