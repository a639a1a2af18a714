"""Leaves a folder behind that other programs can load."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer


class HFExport(Callback):
    """Writes the model at the end of training to `hf/` in the run folder, for plain `transformers` and `peft`.

    Args:
        folder: name of the folder inside the run folder.
        merge: fold LoRA adapters into the weights instead of writing an adapter folder.
    """

    def __init__(self, folder: str = "hf", *, merge: bool = False) -> None:
        self.folder, self.merge = folder, merge

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on all ranks, since sharded weights must be gathered by all; rank 0 writes."""
        if trainer.log_dir is not None:
            pl_module.export(str(Path(trainer.log_dir) / self.folder), merge=self.merge)  # type: ignore[operator]
