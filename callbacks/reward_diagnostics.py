"""Reward diagnostics: is the model right, does it know when, does it count words, and does it meet its own data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.reward_rows import (
    Answer,
    PolicySamples,
    Seen,
    experts,
    pair_rows,
    pairs_of,
    prompt_numbers,
    scores_of,
    seen,
)
from lit_rlhf import records
from lit_rlhf.functional.pair_stats import Pairs, shift, summarise
from lit_rlhf.functional.probe_stats import finite
from lit_rlhf.types import CategoryBatch, Sampling

_SAMPLING = Sampling()
CATEGORIES_LOGGED = 24


class RewardDiagnostics(pl.Callback):
    """Measures a reward model on all held-out pairs, in every validation of a fit, in `validate` and in `test`.

    Accuracy with intervals, overall and by category, beside that of a rule that prefers the longer response;
    reliability, ECE and Brier score of the model's probability against the label; score against length; and, where
    `policy` is given, how far the scores of a policy's samples lie from those of the data. Rows are gathered from all
    processes and each row of the data counts once, so the number of processes changes nothing. Process 0 appends one
    line to `reward.jsonl` in the logger's folder, which `report` reads, and sends numbers and figures to the loggers.

    Any module serves whose `validation_step` and `test_step` return `{"scores": Scores}` of the batch's 2B rows, chosen
    first, for batches with `sequences`, `label`, `index` and, where they have any, `categories` (names). Where the
    validation itself finds their scale, `scores` may be a function that gives them afterwards, and the module's
    `settle()` is called before. The model's probability is sigmoid(chosen - rejected), unless the step returns
    `logits`, [B], too: scores that are standardised or aggregated are no logits. Parts of the scores called `gate/NAME`
    are read as the weights of experts, and their use by category is recorded. With `policy`, the module's
    `score(prompts, responses, categories)` is asked as well.

    Args:
        policy: a JSONL file of samples with `prompt` and `response` (a run's `samples.jsonl` counts by its last step),
            or a policy (model folder, hub id, `builtin:policy`) that answers validation prompts once; None leaves the
            comparison out.
        n_prompts: prompts to answer, or samples to read; >= 1.
        sampling: how a policy draws.
        batch_size: samples drawn or scored at a time; >= 1.
        seed: of the draws.
        bins: of the reliability and length curves; >= 1.
        label: name of the run for people; None takes the logger's, or the module's `method`.

    Raises:
        ValueError: a count is below 1.
        UserError: the module's steps return no scores, a score is not finite, or `policy` cannot be read.
    """

    def __init__(
        self,
        policy: str | None = None,
        n_prompts: int = 128,
        *,
        sampling: Sampling = _SAMPLING,
        batch_size: int = 64,
        seed: int = 0,
        bins: int = 10,
        label: str | None = None,
    ) -> None:
        for name, count in {"n_prompts": n_prompts, "batch_size": batch_size, "bins": bins}.items():
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        self.policy, self.n_prompts, self.sampling, self.batch_size = policy, n_prompts, sampling, batch_size
        self.seed, self.bins, self.label = seed, bins, label
        self._seen: list[Seen] = []
        self._samples: list[Answer] = []
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the record file at the step where training goes on."""
        folder = trainer.log_dir if trainer.loggers else None  # a collective: all processes must ask
        if trainer.is_global_zero and folder is not None:
            records.resume(folder, trainer.global_step)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the pairs of the last time."""
        self._seen, self._started = [], perf_counter()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the step said of the batch."""
        if isinstance(batch, CategoryBatch):
            return  # a DMoERM's validation while its router trains
        self._seen.append(seen(batch, outputs))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, measure, write and log."""
        if trainer.sanity_checking or not self._seen:
            return
        settle: Any = getattr(pl_module, "settle", None)
        if settle is not None:
            settle()  # Lightning runs the module's own hook after this one
        rows = [row for batch in self._seen for row in pair_rows(batch)]
        pairs = pairs_of(rows, experts(scores_of(self._seen[-1])), trainer.world_size)
        found = summarise(pairs, bins=self.bins) | {"policy": self._shift(trainer, pl_module, pairs)}
        about = self._about(trainer, pl_module)
        record = finite(about | found | {"seconds": round(perf_counter() - self._started, 3)})
        stage = "test" if trainer.testing else "val"
        tags = {f"{stage}/{name}": value for name, value in scalars(record).items() if value is not None}
        pl_module.log_dict(tags, batch_size=1, sync_dist=True)  # the same on all processes, and so is their mean
        folder = trainer.log_dir if trainer.loggers else None  # a collective: all processes must ask
        if trainer.is_global_zero:
            if folder is not None:
                records.append(Path(folder) / records.REWARD, [record])
            _show(trainer, record, stage)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _shift(self, trainer: pl.Trainer, module: Any, pairs: Pairs) -> dict[str, Any] | None:
        if self.policy is None:
            return None
        place = (trainer.global_rank, trainer.world_size)
        source = PolicySamples(self.policy, self.n_prompts, self.sampling, self.batch_size, self.seed)
        if not self._samples:
            self._samples = source.answers(module, getattr(trainer, "datamodule", None), *place)
        scores = source.score(module, self._samples, *place)
        prompts = [*pairs.prompts, *pairs.prompts]
        return {"source": self.policy} | shift(pairs.scores, prompts, scores, prompt_numbers(self._samples))

    def _about(self, trainer: pl.Trainer, module: Any) -> records.Record:
        settings = [dict(getattr(part, "hparams", {})) for part in (module, getattr(trainer, "datamodule", None))]
        seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything leaves it
        name = str(getattr(trainer.logger, "name", None) or "")
        method = str(getattr(module, "method", type(module).__name__))
        return {
            "method": method,
            "label": self.label or (name if name not in ("", "lightning_logs") else method),
            "seed": None if seed is None else int(seed),
            "config_hash": records.config_hash(*settings),
            "split": "test" if trainer.testing else "validation",
            "step": trainer.global_step,
            "length_unit": "tokens",
        }


def scalars(record: records.Record) -> dict[str, float | None]:
    """Return the TensorBoard tags of one record, without the stage in front."""
    length, policy = record["length"], record["policy"] or {}
    named = sorted(record["categories"].items(), key=lambda item: -item[1]["accuracy"]["n"])[:CATEGORIES_LOGGED]
    counts: dict[str, float] = {}
    for row in record["experts"].values():
        counts = {name: counts.get(name, 0.0) + value for name, value in row.items()}
    return {
        "reward/accuracy_low": record["accuracy"]["low"],
        "reward/accuracy_high": record["accuracy"]["high"],
        "reward/accuracy_macro": (record["macro"] or {}).get("value"),
        "reward/length_accuracy": record["length_accuracy"]["value"],
        "reward/ece": record["ece"],
        "reward/brier": record["brier"],
        "reward/length_pearson": length["pearson"],
        "reward/length_spearman": length["spearman"],
        "reward/length_slope": length["slope"],
        "reward/prefers_longer": (length["prefers_longer"] or {}).get("value"),
        "reward/policy_shift": policy.get("shift"),
        "reward/policy_auroc": policy.get("auroc"),
        **{f"reward/accuracy/{name}": entry["accuracy"]["value"] for name, entry in named},
        **{f"moe/usage/{name}": value / record["accuracy"]["n"] for name, value in counts.items()},
    }


def _show(trainer: pl.Trainer, record: records.Record, stage: str) -> None:
    """Send figures to TensorBoard and one line to the console."""
    from lit_rlhf import plots, plots_reward  # drawing takes a second to import

    figures = {"reliability": plots_reward.reliability_figure, "length": plots_reward.length_figure}
    figures |= {"categories": plots_reward.category_figure} if record["categories"] else {}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, draw in figures.items():
                picture = plots.pixels(draw(record))
                logger.experiment.add_image(f"{stage}/reward/{name}", picture, record["step"], dataformats="HWC")
    print(("\r\x1b[2K" if sys.stdout.isatty() else "") + _line(record), flush=True)  # over a progress bar


def _line(record: records.Record) -> str:
    right, rule = record["accuracy"], record["length_accuracy"]
    text = f"{record['split']} at step {record['step']}: accuracy {right['value']:.3f} [{right['low']:.3f},"
    text += f" {right['high']:.3f}], longer-is-better {rule['value']:.3f}, ECE {record['ece']:.3f}"
    shifted = (record["policy"] or {}).get("shift")
    return text + ("" if shifted is None else f", policy samples {shifted:+.2f} sd from the data")
