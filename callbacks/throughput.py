"""Speed of training in tokens and samples a second, over all processes."""

from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lit_rlhf.types import Share


class Throughput(pl.Callback):
    """Logs `perf/tokens_per_second` and `perf/samples_per_second`, response tokens and examples over all processes.

    Counts come from the `Share` of each batch, or from the module's `share` where it makes its own examples, so no
    process has to ask another and no device is waited for between two logs. A window ends with every
    `every_n_steps`-th optimizer step; validating or probing inside it counts. Batches without a share are not counted,
    and nothing is logged when none has one.

    Args:
        every_n_steps: optimizer steps a window; >= 1.

    Raises:
        ValueError: when `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._tokens: Tensor | float = 0.0
        self._samples: Tensor | float = 0.0
        self._step, self._since = 0, perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the first window."""
        self._open(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # fmt: skip
        """Count one batch; at the end of a window, log and open the next."""
        del outputs, batch_idx
        share = getattr(batch, "share", getattr(pl_module, "share", None))
        if isinstance(share, Share):
            self._tokens = self._tokens + share.tokens
            self._samples = self._samples + share.examples
        if trainer.global_step - self._step >= self.every_n_steps:
            self._log(trainer)
            self._open(trainer.global_step)

    def _log(self, trainer: pl.Trainer) -> None:
        # the shares that one process meets in a step sum to the step's total over the number of processes
        tokens, samples = (float(x) * trainer.world_size for x in (self._tokens, self._samples))
        if samples == 0:
            return
        seconds = perf_counter() - self._since
        metrics = {"perf/tokens_per_second": tokens / seconds, "perf/samples_per_second": samples / seconds}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _open(self, step: int) -> None:
        self._tokens = self._samples = 0.0
        self._step, self._since = step, perf_counter()
