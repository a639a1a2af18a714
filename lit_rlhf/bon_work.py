"""The samples of best-of-n and their scores: makes what is missing on disk, and reads it back as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_rlhf.bon_curves import Columns, Floats
from lit_rlhf.bon_store import Progress, Row, Stream, lasting
from lit_rlhf.errors import UserError
from lit_rlhf.functional.sequence import row_generator
from lit_rlhf.models.digest import model_digest
from lit_rlhf.specs import plain
from lit_rlhf.types import Prompt, Sampling, Scorer, Scores

RESPONSES = "responses.jsonl"
MODELS, DATA = ("path", "router"), ("references",)  # a scorer's arguments that name what lies on a disk
NUMBERS = ("same_as", "length", "ended")
SCORED_AT_ONCE = 512  # rows handed to a scorer in one call, and lost at most by a kill


@dataclass(frozen=True)
class PromptLine:
    """A prompt with its category."""

    prompt: Prompt
    category: str | None


class Work:
    """A run folder's responses and scores: makes what is missing, and reads back what is there.

    Responses stand by prompt, then sample. A response that repeats an earlier one of its prompt names it in `same_as`
    and takes its scores, so that equal responses tie whatever a scorer's rounding; from there on indices are all that
    counts.

    Args:
        folder: the run folder.
        prompts: P prompts.
        n_samples: N.
        settings: the run's settings as plain data.
        policy: names the policy's weights.

    Raises:
        UserError: the folder was made with other settings.
    """

    def __init__(
        self, folder: Path, prompts: Sequence[PromptLine], n_samples: int, settings: dict[str, Any], policy: str
    ) -> None:
        self.folder, self.prompts, self.n_samples, self.settings = folder, prompts, n_samples, settings
        names = ("prompts", "split", "n_samples", "sampling", "seed")
        texts = repr([line.prompt for line in prompts])
        made_by = {name: settings[name] for name in names} | {"n_prompts": len(prompts)}
        made_by["hash of the policy's weights"] = policy
        made_by["hash of the prompts"] = sha256(texts.encode(errors="backslashreplace")).hexdigest()[:12]
        self.responses = Stream(folder / RESPONSES, made_by)
        self._files: dict[Path, tuple[Stream, Scorer]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """P, N."""
        return len(self.prompts), self.n_samples

    def generate(self, policy: Any, sampling: Sampling, seed: int, batch_size: int) -> None:
        """Draw the responses that are missing."""
        done, known = self._kept()
        total = self.shape[0] * self.shape[1]
        with Progress("responses", total, done) as progress:
            for start in range(done, total, batch_size):
                slots = [divmod(slot, self.n_samples) for slot in range(start, min(start + batch_size, total))]
                generators = [row_generator(seed, 0, prompt, sample) for prompt, sample in slots]
                rollout = policy.sample([self.prompts[p].prompt for p, _ in slots], generators, sampling)
                lengths, ended = rollout.response_mask.sum(-1).tolist(), rollout.ended.tolist()
                rows = []
                for (prompt, sample), text, length, end in zip(slots, rollout.responses, lengths, ended, strict=True):
                    if sample == 0:
                        known = {}
                    first = known.setdefault(text, sample)
                    rows.append(
                        {"prompt_index": prompt, "sample_index": sample, "response": text, "same_as": first}
                        | {"length": length, "ended": end}
                    )
                self.responses.append(rows)
                progress.add(len(rows))

    def open(self, file: Path, scorer: Scorer) -> None:
        """Open a file of scores.

        Raises:
            UserError: it holds the scores of another scorer, or of one with other weights.
        """
        instead = "start a new run, or delete the file to have it made again"
        self._files[file] = Stream(self.folder / file, source_of(scorer), instead), scorer

    def score(self, file: Path, scorer: Scorer, what: str) -> None:
        """Score the distinct responses that are not scored yet, into an open file.

        Raises:
            UserError: a score is not finite.
        """
        distinct = self._places[self.numbers("same_as") == np.arange(self.n_samples)]
        stream, _ = self._files[file]
        done = sum(1 for _ in stream)
        with Progress(what, len(distinct), done) as progress:
            for start in range(done, len(distinct), SCORED_AT_ONCE):
                chunk = list(self.responses.at(distinct[start : start + SCORED_AT_ONCE].tolist()))
                lines = [self.prompts[row["prompt_index"]] for row in chunk]
                texts = [row["response"] for row in chunk]
                scores = scorer.score([line.prompt for line in lines], texts, [line.category for line in lines])
                stream.append(_score_rows(chunk, scores, what))
                progress.add(len(chunk))

    def columns(self, file: Path) -> Columns:
        """Read scores back as arrays over all samples, repeated responses included; see `source_of` for totals."""
        stream, scorer = self._files[file]
        rows = iter(stream)
        first = next(rows)
        count, parts = len(first["members"] or ()), first["parts"]
        grid = np.full((*self.shape, 1 + count + len(parts)), np.nan)
        for row in chain([first], rows):
            values = [row["total"], *(row["members"] or ()), *row["parts"].values()]
            grid[row["prompt_index"], row["sample_index"]] = values
        grid = np.take_along_axis(grid, self.numbers("same_as").astype(np.intp)[..., None], 1)
        members = grid[..., 1 : 1 + count] if count else None
        return Columns(
            total=grid[..., 0] if members is None or not _combines(scorer) else _combined(scorer, members),
            members=members,
            parts={name: grid[..., 1 + count + i] for i, name in enumerate(parts)},
        )

    def numbers(self, name: str) -> Floats:
        """Return one number of every response, [P, N]: "same_as", "length" or "ended"."""
        return self._table[0][..., NUMBERS.index(name)]

    def texts(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """Read some responses by prompt and sample number."""
        slots = sorted(set(wanted))
        rows = self.responses.at(int(self._places[slot]) for slot in slots)
        return {slot: row["response"] for slot, row in zip(slots, rows, strict=True)}

    @property
    def _places(self) -> NDArray[np.int64]:
        return self._table[1]

    @cached_property
    def _table(self) -> tuple[Floats, NDArray[np.int64]]:
        """Numbers [P, N, 3] and places in the file [P, N] of all responses, from one pass; no text is kept."""
        numbers, places = np.zeros((*self.shape, len(NUMBERS))), np.zeros(self.shape, np.int64)
        for slot, (place, row) in enumerate(self.responses.placed()):
            where = divmod(slot, self.n_samples)
            numbers[where], places[where] = [row[name] for name in NUMBERS], place
        return numbers, places

    def _kept(self) -> tuple[int, dict[str, int]]:
        """Count the responses on disk, and return those of the last prompt by text."""
        done, known = 0, dict[str, int]()
        for row in self.responses:
            if (row["prompt_index"], row["sample_index"]) != divmod(done, self.n_samples):
                raise UserError(f"{self.responses.path}: rows are missing or out of order after {done}")
            known = {} if row["sample_index"] == 0 else known
            known.setdefault(row["response"], row["sample_index"])
            done += 1
        return done, known


def source_of(scorer: Any) -> dict[str, Any]:
    """Return what a scorer's numbers depend on: its description, and the contents of the models and data it names.

    Left out are what says how fast it works, and an ensemble's aggregator: totals are made of the members' scores when
    they are read.
    """
    described = lasting(plain(scorer))
    if _combines(scorer):
        described["init_args"].pop("aggregator")
    models = {path: model_digest(path) for path in _named(described, MODELS)}
    data = {path: _file_digest(path) for path in _named(described, DATA) if Path(path).is_file()}
    return {"scorer": described, "hash of the weights": models} | ({"hash of the references": data} if data else {})


def _combines(scorer: Any) -> bool:
    from lit_rlhf.models.scorers import Ensemble, EnsembleRewardModel

    return isinstance(scorer, Ensemble | EnsembleRewardModel)


def _combined(scorer: Any, members: Floats) -> Floats:
    flat = torch.from_numpy(members.reshape(-1, members.shape[-1])).float()  # as precise as scorers are
    return np.asarray(scorer.aggregator(flat).double().reshape(members.shape[:-1]))


def _named(described: Any, keys: Sequence[str]) -> list[str]:
    """Return the strings under these keys, at any depth."""
    if isinstance(described, list):
        return [name for item in described for name in _named(item, keys)]
    if not isinstance(described, dict):
        return []
    here = [value for key, value in described.items() if key in keys and isinstance(value, str)]
    return here + [name for item in described.values() for name in _named(item, keys)]


def _file_digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _score_rows(chunk: Sequence[Row], scores: Scores, what: str) -> list[Row]:
    totals = scores.total.double().tolist()
    members = [None] * len(chunk) if scores.members is None else scores.members.double().tolist()
    parts = {name: values.double().tolist() for name, values in scores.parts.items()}
    rows = []
    for i, row in enumerate(chunk):
        values = [totals[i], *(members[i] or ()), *(part[i] for part in parts.values())]
        if not np.isfinite(values).all():
            raise UserError(f"{what}: expected finite numbers for {row['response']!r}, got {values}")
        places = {name: row[name] for name in ("prompt_index", "sample_index")}
        scored = {"total": totals[i], "members": members[i], "parts": {name: part[i] for name, part in parts.items()}}
        rows.append(places | scored)
    return rows
