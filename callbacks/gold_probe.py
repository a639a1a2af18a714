"""The gold probe: what a policy gives away in KL, what its proxy says about it, and what the gold reward says."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.probe_log import scalars, show
from callbacks.probe_rows import ProbePlan, Row, undisturbed
from lit_rlhf import records
from lit_rlhf.functional.curves import Curve, curve_of
from lit_rlhf.functional.probe_stats import finite, summarise
from lit_rlhf.types import Probeable, Sampling, Scorer, UserError

_SAMPLING = Sampling()
_MONITORED = ("gold/score", "gold/proxy_gap", "gold/win_rate")


class GoldProbe(pl.Callback):
    """Samples the policy on fixed prompts and measures KL, proxy and gold on the same samples.

    It fires at step 0 before any update, whenever `every_n_steps` more optimizer steps are done, and at the end. Every
    process samples its share of the prompts; statistics are taken over the gathered rows, and each row has its own
    generator, so the number of processes changes nothing. Process 0 appends to `probe.jsonl` and `samples.jsonl` in the
    logger's folder. Training is not touched: random states and train/eval modes are put back, no gradient is recorded.

    `ModelCheckpoint` and `EarlyStopping` may monitor `gold/score`, `gold/proxy_gap` and `gold/win_rate`; give them the
    same rhythm (`every_n_train_steps`, `val_check_interval`): between two probes they see the last value again.

    The trained module is a `Probeable`. The data module has `probe_prompts(n)`, a list of (prompt, category), and may
    have `gold`. A module may have four things more, by these names:

    - `probe_extras(rollout, logps, reference_logps) -> dict`: `implicit_reward` as [B]; `implicit_margin`,
      `implicit_accuracy` and `constraints` as plain values that are the same on all processes. Margin and accuracy are
      otherwise those of the last validation (`val/rewards/margins`, `val/rewards/accuracies`).
    - `label`: what the run is, in a few words.
    - `updates`: rollout cycles done; without it an update is an optimizer step.
    - `examples_seen`: prompts or pairs trained on; without it they are counted by the batches' `Share`.

    Args:
        every_n_steps: optimizer steps between two probes; >= 1.
        n_prompts: prompts, the first of the data module's; fewer where it has fewer; >= 1.
        samples_per_prompt: responses to each; standard errors are clustered by prompt; >= 1.
        sampling: how responses are drawn; anything but temperature 1, top_p 1, top_k 0 biases KL.
        gold: the believed reward; None takes the data module's, if it has one.
        label: name of the run for people; None takes the logger's, unless that only repeats the module's `method` or is
            Lightning's own, then the module's `label` if it has one, and its `method` at last.
        batch_size: responses sampled in one call; >= 1.
        seed: seed of the samples, which are the same in all runs with equal policies.
        table_rows: samples in TensorBoard's text table.

    Raises:
        ValueError: a count is below 1.
        UserError: on start, when module or data module cannot be probed.
    """

    def __init__(  # noqa: PLR0913 - one argument for each key of the config
        self,
        every_n_steps: int = 50,
        n_prompts: int = 64,
        *,
        samples_per_prompt: int = 1,
        sampling: Sampling = _SAMPLING,
        gold: Scorer | None = None,
        label: str | None = None,
        batch_size: int = 64,
        seed: int = 0,
        table_rows: int = 8,
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "n_prompts": n_prompts}
        for name, count in {**counts, "samples_per_prompt": samples_per_prompt, "batch_size": batch_size}.items():
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        self.every_n_steps, self.n_prompts, self.samples_per_prompt = every_n_steps, n_prompts, samples_per_prompt
        self.sampling, self.gold, self.label, self.batch_size = sampling, gold, label, batch_size
        self.seed, self.table_rows = seed, table_rows
        self._base: list[Row] | None = None
        self._examples: torch.Tensor | float | None = None
        self._history: list[records.Record] = []

    def state_dict(self) -> dict[str, Any]:
        """Keep what a resumed run cannot measure again: the scores of the step-0 samples, and the examples seen."""
        return {"base": self._base, "examples": None if self._examples is None else float(self._examples)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._base, self._examples = state_dict["base"], state_dict["examples"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open or reopen the record files; probe at step 0, or where a kill swallowed the checkpoint's record."""
        self._plan = self._planned(trainer, pl_module)
        self._folder = trainer.log_dir if trainer.loggers else None
        writes = trainer.is_global_zero and self._folder is not None
        kept = records.resume(self._folder, trainer.global_step) if writes and self._folder else []
        self._history = trainer.strategy.broadcast(kept)
        if self._due(trainer):
            self._probe(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # fmt: skip
        """Probe when it is time, and let the callbacks that come after this one monitor the result."""
        del outputs, batch_idx
        share = getattr(batch, "share", None)
        if share is not None:  # one process's shares of a step sum to the step's total over the number of processes
            before = 0.0 if self._examples is None else self._examples
            self._examples = before + share.examples * trainer.world_size
        if self._due(trainer):
            for name, value in self._probe(trainer, pl_module).items():
                pl_module.log(name, value, on_step=True, on_epoch=False, logger=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Probe the final policy, if its step was not probed yet."""
        if self._history[-1]["step"] != trainer.global_step:
            self._probe(trainer, pl_module)

    def _planned(self, trainer: pl.Trainer, module: pl.LightningModule) -> ProbePlan:
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(module, Probeable):
            raise UserError(
                f"GoldProbe needs a module with method, sample, reference_logps and proxy, got {type(module)}"
            )
        if not hasattr(data, "probe_prompts"):
            raise UserError(f"GoldProbe needs a data module with probe_prompts(n), got {type(data)}")
        prompts = data.probe_prompts(self.n_prompts)
        if not prompts:
            raise UserError(f"GoldProbe needs prompts, but {type(data).__name__} has none to validate on")
        gold = self.gold or getattr(data, "gold", None)
        if gold is None and trainer.is_global_zero:
            print("GoldProbe: neither the config nor the data has a gold scorer; gold and win rate stay empty")
        return ProbePlan(prompts, self.samples_per_prompt, self.sampling, self.batch_size, self.seed, gold)

    def _due(self, trainer: pl.Trainer) -> bool:
        done = self._history[-1]["step"] if self._history else -1
        return trainer.global_step // self.every_n_steps > done // self.every_n_steps

    def _probe(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, torch.Tensor]:
        """Measure, write and log one record; return what other callbacks may monitor."""
        started, update = perf_counter(), int(getattr(module, "updates", trainer.global_step))
        with undisturbed(module, module.device):
            rows, extras = self._plan.measure(module, update, trainer.global_rank, trainer.world_size)
        if trainer.global_step == 0:
            self._base = [{name: row[name] for name in ("prompt_index", "proxy", "gold")} for row in rows]
        about = self._about(trainer, module) | {"update": update} | extras
        record = finite(about | summarise(rows, self._base) | {"seconds": round(perf_counter() - started, 3)})
        self._history = [*self._history, record]
        curve = curve_of(record["label"], [self._history])
        metrics = scalars(record, curve.fit)
        if trainer.is_global_zero:
            self._write(trainer, rows, curve, {name: value for name, value in metrics.items() if value is not None})
        monitored = {n: torch.tensor(metrics[n]) for n in _MONITORED if metrics[n] is not None}
        trainer.callback_metrics.update(monitored)  # also at the start and the end, where Lightning allows no `log`
        return monitored

    def _about(self, trainer: pl.Trainer, module: Any) -> records.Record:
        seen = getattr(module, "examples_seen", 0 if trainer.global_step == 0 else self._examples)
        settings = [dict(getattr(part, "hparams", {})) for part in (module, getattr(trainer, "datamodule", None))]
        seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything leaves it
        heldout = (trainer.callback_metrics.get(f"val/rewards/{name}") for name in ("margins", "accuracies"))
        margin, accuracy = (None if value is None else float(value) for value in heldout)
        return {
            "method": module.method, "label": self.label or _label(trainer, module),
            "seed": None if seed is None else int(seed),
            "config_hash": records.config_hash(*settings, _trainer_settings(trainer)),
            "step": trainer.global_step, "epoch": trainer.current_epoch,
            "examples_seen": None if seen is None else round(float(seen)),
            "implicit_margin": margin, "implicit_accuracy": accuracy, "constraints": None,
            "n_prompts": len(self._plan.prompts), "n_samples": len(self._plan.prompts) * self.samples_per_prompt,
            "sampling": dict(vars(self.sampling)),
        }  # fmt: skip

    def _write(self, trainer: pl.Trainer, rows: list[Row], curve: Curve, metrics: dict[str, float]) -> None:
        """Put the newest record on disk, in the loggers and on the console."""
        record = self._history[-1]
        step = record["step"]
        if self._folder is not None:  # samples first: a record promises that its samples are there
            stamp = {"step": step, "update": record["update"]}
            records.append(Path(self._folder) / records.SAMPLES, (finite(stamp | row) for row in rows))
            records.append(Path(self._folder) / records.PROBE, [record])
        show(trainer.loggers, record, rows[: self.table_rows], curve, metrics)


def _label(trainer: pl.Trainer, module: Any) -> str:
    name = str(getattr(trainer.logger, "name", None) or "")
    if name not in ("", module.method, "lightning_logs"):  # the last is what Lightning calls a run without a name
        return name
    return str(getattr(module, "label", None) or module.method)


def _trainer_settings(trainer: pl.Trainer) -> dict[str, Any]:
    """What the trainer decides about the outcome, for the configuration's hash."""
    names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
    rows = getattr(getattr(trainer, "datamodule", None), "batch_size", 1)
    return {name: getattr(trainer, name) for name in names} | {"batch": trainer.world_size * rows}
