"""What a reward model said of held-out pairs and of a policy's samples, gathered from all processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from callbacks.probe_rows import undisturbed
from lit_rlhf import records
from lit_rlhf.functional.pair_stats import Pairs
from lit_rlhf.models.answers import answers
from lit_rlhf.types import Prompt, Sampling, Scores, UserError

GATE = "gate/"
T = TypeVar("T")


class PairRow(NamedTuple):
    """One scored pair."""

    row: int
    prompt: int
    label: float
    chosen_length: int
    rejected_length: int
    category: str | None
    chosen: float
    rejected: float
    logit: float
    gates: tuple[float, ...]


class Seen(NamedTuple):
    """One batch: its pairs' own columns of `PairRow`, and what the module's step returned."""

    pairs: list[tuple[Any, ...]]
    outputs: Mapping[str, Any]


class Answer(NamedTuple):
    """One response of a policy."""

    prompt: Prompt
    category: str | None
    response: str


def seen(batch: Any, outputs: Any) -> Seen:
    """Keep of a batch what its rows need, and not its tokens.

    A prompt is known by its tokens.

    Args:
        batch: B pairs, a `PreferenceBatch` or what has its `sequences`, `label`, `index` and perhaps `categories`.
        outputs: of the module's step.
    """
    lengths = batch.sequences.response_lengths.reshape(2, -1).long().tolist()
    n = len(batch.label)
    categories = getattr(batch, "categories", ()) or [None] * n
    columns = (batch.index.tolist(), _prompts(batch)[:n], batch.label.tolist(), *lengths, categories)
    return Seen(list(zip(*columns, strict=True)), outputs if isinstance(outputs, Mapping) else {})


def scores_of(batch: Seen) -> Any:
    """Return the scores of a batch, also where the step returned a function that gives them after the validation."""
    scores = batch.outputs.get("scores")
    return scores() if callable(scores) else scores


def pair_rows(batch: Seen) -> list[PairRow]:
    """Return the pairs of a batch with what the module's step said of its 2B rows.

    The parts called `gate/NAME` are experts' weights; of a pair's two the mean counts. The step's `logits`, [B], are
    those of its probability that `chosen` is the better one; without them they are the margins of the scores.

    Args:
        batch: as `seen` keeps it; `scores` are `Scores` of the 2B rows, chosen first, or give them when called.

    Raises:
        UserError: the step returned other scores than one for each row, or one that is no finite number.
    """
    scores = scores_of(batch)
    total = scores.total if isinstance(scores, Scores) else torch.zeros(0)
    n = len(batch.pairs)
    if total.shape != (2 * n,):
        raise UserError(
            "RewardDiagnostics needs a module whose validation_step and test_step return {'scores': Scores} with one"
            f" score for each of the {2 * n} rows of a batch; got {_kind(scores)}"
        )
    if not total.isfinite().all():
        row = int((~total.isfinite()).nonzero()[0])
        raise UserError(f"the reward model's score of pair {batch.pairs[row % n][0]} is {total[row].item()}")
    gates = [_halves(scores.parts[GATE + name], n).mean(0).tolist() for name in experts(scores)]
    chosen, rejected = _halves(total, n)
    logits = batch.outputs.get("logits", chosen - rejected)
    if logits.shape != (n,):
        raise UserError(f"the step returned logits of shape {tuple(logits.shape)}; expected one for each of {n} pairs")
    columns = (chosen.tolist(), rejected.tolist(), logits.tolist(), list(zip(*gates, strict=True)) or [()] * n)
    return [PairRow(*pair, *row) for pair, *row in zip(batch.pairs, *columns, strict=True)]


def pairs_of(rows: Sequence[PairRow], names: Sequence[str], world: int) -> Pairs:
    """Gather the rows of all processes, each row of the data once, in the order of the data.

    Rows that a sampler repeated to make the processes even are dropped here, before anything is counted.

    Args:
        rows: of this process.
        names: of the experts, as `experts` gives them.
        world: number of processes.
    """
    unique = {row.row: row for row in gathered(rows, world)}
    columns = list(zip(*(unique[number] for number in sorted(unique)), strict=True))
    _, prompt, label, chosen_length, rejected_length, category, chosen, rejected, logit, gates = columns
    return Pairs(
        chosen=np.array(chosen, np.float64),
        rejected=np.array(rejected, np.float64),
        label=np.array(label, np.float64),
        chosen_length=np.array(chosen_length, np.float64),
        rejected_length=np.array(rejected_length, np.float64),
        prompts=np.array(prompt, np.int64),
        categories=category,
        gates={name: np.array([row[k] for row in gates], np.float64) for k, name in enumerate(names)},
        logits=np.array(logit, np.float64),
    )


def experts(scores: Any) -> list[str]:
    """Return the names of the experts whose weights the scores carry."""
    return [name.removeprefix(GATE) for name in scores.parts if name.startswith(GATE)]


def gathered(rows: Sequence[T], world: int) -> list[T]:
    """Return the rows of all processes, by rank."""
    if world == 1:
        return list(rows)
    parts: list[list[T]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]


@dataclass(frozen=True)
class PolicySamples:
    """Where the policy samples come from that a reward model is compared on.

    Args:
        source: a JSONL file with `prompt` and `response` (also a run's `samples.jsonl`, whose last step counts), or a
            policy: model folder, hub id or `builtin:` name.
        n_prompts: how many validation prompts a policy answers, or samples of a file are read.
        sampling: how a policy draws.
        batch_size: responses at a time.
        seed: of the draws.
    """

    source: str
    n_prompts: int
    sampling: Sampling
    batch_size: int
    seed: int

    def answers(self, module: Any, data: Any, rank: int, world: int) -> list[Answer]:
        """Read or draw the samples, the same on every process; each draws its share."""
        if self.source.endswith(".jsonl"):
            return self._read()
        if not hasattr(data, "probe_prompts"):
            raise UserError(f"RewardDiagnostics needs a data module with probe_prompts(n), got {type(data).__name__}")
        prompts: list[tuple[Prompt, str | None]] = data.probe_prompts(self.n_prompts)
        own = list(range(rank, len(prompts), world))
        with undisturbed(module, module.device):
            texts = answers(
                self.source, [prompts[i][0] for i in own], own, self.sampling, seed=self.seed,
                batch_size=self.batch_size, joiner=getattr(data, "joiner", " "), device=module.device,
            )  # fmt: skip
        drawn = dict(gathered(list(zip(own, texts, strict=True)), world))
        return [Answer(*prompts[i], drawn[i]) for i in range(len(prompts))]

    def score(self, module: Any, samples: Sequence[Answer], rank: int, world: int) -> list[float]:
        """Score the samples by the module, each process its share in equally many calls, as sharded models need."""
        own = list(range(rank, len(samples), world))
        passes = math.ceil(len(samples) / world)
        padded = list(islice(cycle(own or [0]), passes))
        found: list[float] = []
        for start in range(0, passes, self.batch_size):
            rows = [samples[i] for i in padded[start : start + self.batch_size]]
            columns = (list(column) for column in zip(*rows, strict=True))
            prompts, categories, responses = columns
            with undisturbed(module, module.device):
                found += module.score(prompts, responses, categories).total.tolist()
        scored = dict(gathered(list(zip(own, found[: len(own)], strict=True)), world))
        return [scored[i] for i in range(len(samples))]

    def _read(self) -> list[Answer]:
        rows = records.read(Path(self.source).expanduser())
        last = max((row.get("step", 0) for row in rows), default=0)
        kept = [row for row in rows if row.get("step", 0) == last][: self.n_prompts]
        for number, row in enumerate(kept, 1):
            if row.get("prompt") is None or not isinstance(row.get("response"), str):
                raise UserError(f"{self.source}, row {number}: expected `prompt` and `response`, got {', '.join(row)}")
        if not kept:
            raise UserError(f"{self.source}: the file holds no samples; expected rows with `prompt` and `response`")
        return [Answer(row["prompt"], row.get("category"), row["response"]) for row in kept]


def prompt_numbers(samples: Sequence[Answer]) -> list[int]:
    """Return one number a sample, equal for equal prompts."""
    return [_number(str(sample.prompt).encode()) for sample in samples]


def _kind(scores: Any) -> str:
    return f"scores of shape {tuple(scores.total.shape)}" if isinstance(scores, Scores) else type(scores).__name__


def _halves(values: Tensor, n: int) -> Tensor:
    return values.detach().double().cpu().reshape(2, n)


def _prompts(batch: Any) -> list[int]:
    rows = batch.sequences
    mask = rows.attention_mask & ~rows.response_mask
    return [_number(ids[keep].numpy().tobytes()) for ids, keep in _listed(rows.ids, mask)]


def _listed(ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(ids.cpu(), mask.cpu(), strict=True)


def _number(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=7).digest(), "big")  # the same on every process, unlike hash()
