"""Keeps the checkpoint at the gold peak."""

from __future__ import annotations

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
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save as Lightning does; give up the monitor where nothing has logged it by the first save."""
        if self.monitor is not None and self._due(trainer) and self.monitor not in trainer.callback_metrics:
            rank_zero_info(f"No {self.monitor!r} is logged in this run: the latest checkpoint is kept, not the peak's.")
            self.monitor = None
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def _due(self, trainer: Trainer) -> bool:
        return trainer.global_step > 0 and trainer.global_step % self._every_n_train_steps == 0
