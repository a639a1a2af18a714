"""A progress bar for methods that sample, score and learn in turn."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class RLProgress(TQDMProgressBar):
    """Lightning's bar that names the phase of the update, with reward, gold, KL and multipliers beside the loss.

    Modules announce their phases by calling `on_phase(trainer, module, name)` of every callback that has it; with a
    module that announces none this is Lightning's own bar. Figures are those of the last update, gold that of the last
    probe.

    Args:
        refresh_rate: batches between two redraws; 0 hides the bar.
        leave: keep a finished epoch's bar.
    """

    def __init__(self, refresh_rate: int = 1, *, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave=leave)

    def on_phase(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        """Show what begins now."""
        del pl_module
        bar = self._train_progress_bar
        if bar is not None and self.is_enabled:
            bar.set_description(f"Epoch {trainer.current_epoch}, {name}")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return Lightning's figures and, where they are logged, those of the task and of every constraint."""
        return super().get_metrics(trainer, pl_module) | figures(trainer)


def figures(trainer: Trainer) -> dict[str, str]:
    """Return reward, gold, KL (nats a response) and multipliers by short names, as far as they are logged."""
    logged = trainer.callback_metrics
    tags = {"reward": "objective/scores", "gold": "gold/score", "kl": "objective/kl"}
    found = {name: logged[tag] for name, tag in tags.items() if tag in logged and "objective/kl" in logged}
    for tag, value in logged.items():
        if tag.startswith("constraint/") and tag.endswith("/multiplier"):
            found[f"mu {tag.split('/')[1]}"] = value
    return {name: f"{float(value):.3g}" for name, value in found.items()}
