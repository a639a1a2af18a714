"""What a run is about to do, printed once before it does it."""

from __future__ import annotations

from time import monotonic
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_rlhf.modules.optimizer import planned_steps


class StartBanner(Callback):
    """Prints parameters, batch arithmetic, the rows kept and dropped, and the first example with its mask."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print on rank 0."""
        lines = [*parameters(pl_module), batches(trainer), *trainer.datamodule.report()]  # type: ignore[attr-defined]
        rank_zero_only(print)("\n".join(lines), flush=True)
        if trainer.logger is not None:
            found = trainer.datamodule.examples("train")  # type: ignore[attr-defined]
            counts = {"data/rows_dropped": found.dropped.total(), "data/responses_truncated": found.truncated}
            trainer.logger.log_metrics(counts, step=0)


class LineProgress(Callback):
    """Prints a line of progress every few seconds, where no terminal could show a bar.

    Args:
        seconds: between two lines.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds = seconds
        self._last = 0.0
        self._steps = 0

    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        """Count once."""
        self._steps = planned_steps(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Print on rank 0 when it is time."""
        if trainer.is_global_zero and monotonic() - self._last > self.seconds:
            self._last = monotonic()
            loss = trainer.callback_metrics.get("loss")
            shown = "" if loss is None else f", loss {loss:.4f}"
            print(f"step {trainer.global_step} of {self._steps}{shown}", flush=True)


def parameters(module: LightningModule) -> list[str]:
    """Return one line per backbone: parameters, trainable share, dtype, and the path that the head takes."""
    lines = []
    for name, backbone in module.named_children():
        sizes = [(p.numel(), p.requires_grad, p.dtype) for p in backbone.parameters()]
        total, trained = sum(n for n, _, _ in sizes), sum(n for n, grad, _ in sizes if grad)
        if not total:
            continue
        dtypes = "/".join(sorted({str(dtype).removeprefix("torch.") for _, _, dtype in sizes}))
        head = getattr(backbone, "head_path", None)
        note = f", output head {head}" if head else ""
        lines.append(f"{name}: {total:,} parameters, {trained:,} trained ({trained / total:.1%}), {dtypes}{note}")
    return lines


def batches(trainer: Trainer) -> str:
    """Return the arithmetic of one optimizer step."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    size, world, accumulate = data.hparams.batch_size, trainer.world_size, trainer.accumulate_grad_batches
    several = getattr(trainer.lightning_module, "steps_per_batch", 1)
    what = "a step" if several == 1 else f"an update of {several} steps"
    return (
        f"batch: {size} a process x {world} processes x {accumulate} accumulated = {size * world * accumulate} "
        f"{what}, {planned_steps(trainer)} steps"
    )
