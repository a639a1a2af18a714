"""Samples of a policy on fixed prompts, shared out over processes, as one row for each response."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_rlhf.functional.policy_gradient import kl_estimates
from lit_rlhf.functional.sequence import row_generator
from lit_rlhf.types import Prompt, Rollout, Sampling, Scorer

Row = dict[str, Any]
Slot = tuple[int, int]  # prompt and sample number of a response


@dataclass(frozen=True)
class ProbePlan:
    """What a probe samples, the same at every step.

    Args:
        prompts: P pairs of prompt and category.
        samples_per_prompt: responses to each.
        sampling: how they are drawn.
        batch_size: responses in one call of the policy.
        seed: seed of the rows' generators.
        gold: scores the responses; None leaves gold out.
    """

    prompts: Sequence[tuple[Prompt, str | None]]
    samples_per_prompt: int
    sampling: Sampling
    batch_size: int
    seed: int
    gold: Scorer | None

    def measure(self, module: Any, update: int, rank: int, world: int) -> tuple[list[Row], Row]:
        """Sample and score on this process, then gather.

        Prompt i belongs to rank i modulo world. Every rank makes the same number of calls, as sharded models need:
        short ranks repeat rows, which are dropped before anything is counted.

        Args:
            module: a `Probeable`, with or without `probe_extras`.
            update: rollout cycle; seeds the rows together with prompt and sample number.
            rank: this process.
            world: number of processes.

        Returns:
            All rows of all ranks by prompt and sample, and the plain values of the module's `probe_extras`.
        """
        samples = range(self.samples_per_prompt)
        own = [(i, j) for i in range(rank, len(self.prompts), world) for j in samples]
        passes = math.ceil(len(self.prompts) / world) * len(samples)
        padded = list(islice(cycle(own or [(0, 0)]), passes))
        rows: list[Row] = []
        extras: Row = {}
        for start in range(0, passes, self.batch_size):
            more, extras = self._rows(module, update, padded[start : start + self.batch_size])
            rows += more
        rows = _gathered(rows[: len(own)], world)
        return sorted(rows, key=lambda row: (row["prompt_index"], row["sample_index"])), extras

    def _rows(self, module: Any, update: int, slots: list[Slot]) -> tuple[list[Row], Row]:
        prompts = [self.prompts[i][0] for i, _ in slots]
        categories = [self.prompts[i][1] for i, _ in slots]
        generators = [row_generator(self.seed, update, i, j) for i, j in slots]
        rollout: Rollout = replace(module.sample(prompts, generators, self.sampling), categories=categories)
        reference = module.reference_logps(rollout)
        extras = {}
        if hasattr(module, "probe_extras"):
            extras = dict(module.probe_extras(rollout, rollout.token_logps, reference))
        columns = _measured(rollout, reference) | {
            "prompt": prompts, "category": categories, "response": rollout.responses,
            "implicit_reward": _listed(extras.pop("implicit_reward", None), len(slots)),
        }  # fmt: skip
        columns |= _scored("proxy", module.proxy(rollout), len(slots))
        columns |= _scored("gold", self.gold and self.gold.score(prompts, rollout.responses, categories), len(slots))
        rows = [{name: values[k] for name, values in columns.items()} for k in range(len(slots))]
        return [{"prompt_index": i, "sample_index": j, **row} for (i, j), row in zip(slots, rows, strict=True)], extras


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a module in eval mode without gradients, and put back every submodule's mode and all random states after."""
    modes = {part: part.training for part in module.modules()}
    devices = [device] if device.type == "cuda" else []
    module.eval()
    try:
        with isolate_rng(include_cuda=False), torch.random.fork_rng(devices, enabled=bool(devices)), torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _measured(rollout: Rollout, reference: Tensor) -> dict[str, list[Any]]:
    logps, mask = rollout.token_logps, rollout.response_mask
    kl = {f"kl_{name}": values.tolist() for name, values in kl_estimates(logps, reference, mask).items()}
    return {"length": mask.sum(-1).tolist(), "ended": rollout.ended.tolist(), **kl}


def _scored(name: str, scores: Any, rows: int) -> dict[str, list[Any]]:
    """Columns `name`, `name_members` and `name_by` of a scorer's answer, or of None."""
    parts = {} if scores is None else {part: values.tolist() for part, values in scores.parts.items()}
    return {
        name: _listed(None if scores is None else scores.total, rows),
        f"{name}_members": _listed(None if scores is None else scores.members, rows),
        f"{name}_by": [{part: values[k] for part, values in parts.items()} or None for k in range(rows)],
    }


def _listed(values: Tensor | None, rows: int) -> list[Any]:
    return [None] * rows if values is None else values.tolist()


def _gathered(rows: list[Row], world: int) -> list[Row]:
    if world == 1:
        return rows
    parts: list[list[Row]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
