"""The samples of best-of-n and their scores: makes what is missing on disk, and reads it back as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lit_rlhf.bon_curves import Columns, Floats
from lit_rlhf.bon_store import Progress, Row, Stream
from lit_rlhf.errors import UserError
from lit_rlhf.functional.sequence import row_generator
from lit_rlhf.models.digest import model_digest
from lit_rlhf.specs import plain
from lit_rlhf.types import Prompt, Sampling, Scorer, Scores

RESPONSES = "responses.jsonl"
HARMLESS = ("batch_size", "device")  # of a scorer: they change rounding at most
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
        self._files: dict[Path, Stream] = {}

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
        self._files[file] = Stream(self.folder / file, source_of(scorer))

    def score(self, file: Path, scorer: Scorer, what: str) -> None:
        """Score the distinct responses that are not scored yet, into an open file.

        Raises:
            UserError: a score is not finite.
        """
        distinct = sum(row["same_as"] == row["sample_index"] for row in self.responses)
        stream = self._files[file]
        done = sum(1 for _ in stream)
        missing = islice(self._distinct(), done, None)
        with Progress(what, distinct, done) as progress:
            while chunk := list(islice(missing, SCORED_AT_ONCE)):
                lines = [self.prompts[row["prompt_index"]] for row in chunk]
                texts = [row["response"] for row in chunk]
                scores = scorer.score([line.prompt for line in lines], texts, [line.category for line in lines])
                stream.append(_score_rows(chunk, scores, what))
                progress.add(len(chunk))

    def columns(self, file: Path) -> Columns:
        """Read scores back as arrays over all samples, repeated responses included."""
        found: list[Row] = list(self._files[file])
        members, parts = found[0]["members"], found[0]["parts"]
        width = 1 + len(members or ()) + len(parts)
        grid = np.full((*self.shape, width), np.nan)
        for row in found:
            values = [row["total"], *(row["members"] or ()), *row["parts"].values()]
            grid[row["prompt_index"], row["sample_index"]] = values
        same_as = self.numbers("same_as").astype(np.intp)
        grid = np.take_along_axis(grid, same_as[..., None], 1)
        count = len(members or ())
        return Columns(
            total=grid[..., 0],
            members=grid[..., 1 : 1 + count] if members else None,
            parts={name: grid[..., 1 + count + i] for i, name in enumerate(parts)},
        )

    def numbers(self, name: str) -> Floats:
        """Read one number of every response, [P, N]."""
        values = np.fromiter((row[name] for row in self.responses), np.float64, self.shape[0] * self.shape[1])
        return values.reshape(self.shape)

    def texts(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """Read some responses by prompt and sample number."""
        places = set(wanted)
        rows = (((row["prompt_index"], row["sample_index"]), row["response"]) for row in self.responses)
        return {place: text for place, text in rows if place in places}

    def _distinct(self) -> Iterator[Row]:
        return (row for row in self.responses if row["same_as"] == row["sample_index"])

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
    """Return what scores depend on: the scorer's description without what says how fast, and the weights it names."""
    paths: list[str] = []

    def described(value: Any) -> Any:
        if isinstance(value, list):
            return [described(item) for item in value]
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("path"), str):
            paths.append(value["path"])
        return {key: described(item) for key, item in value.items() if key not in HARMLESS}

    found = described(plain(scorer))
    return {"scorer": found, "hash of the weights": {path: model_digest(path) for path in paths}}


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
