"""Rows of data as people write them, checked and turned into records.

Every complaint names the file, the line, the key, the value and what was expected. Unknown keys are ignored, and a key
whose value is null counts as absent (Parquet fills columns that way).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import permutations
from typing import Any

from lit_rlhf.types import Message, Prompt, UserError

ROLES = ("system", "user", "assistant")
_SHOWN = 60  # characters of an offending value in a message


@dataclass(frozen=True)
class Origin:
    """Where a row came from; `str` gives `file:line`, counted from 1."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Record:
    """One row as read, with its origin."""

    origin: Origin
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return the value of a key; None where it is absent."""
        return self.values.get(key)

    def wrong(self, key: str, expected: str) -> UserError:
        """Return the complaint about one key."""
        value = self.get(key)
        if value is None:
            keys = ", ".join(self.values) or "none"
            return UserError(f"{self.origin}: `{key}` is missing; expected {expected} (the row has: {keys})")
        text = repr(value)
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
        return UserError(f"{self.origin}: `{key}` is {shown}; expected {expected}")


@dataclass(frozen=True)
class Row:
    """What all rows have.

    Args:
        origin: file and line.
        prompt: what is answered or continued.
        category: task category.
    """

    origin: Origin
    prompt: Prompt
    category: str | None

    @property
    def answers(self) -> tuple[str, ...]:
        """The responses to encode with the prompt."""
        return ()

    @property
    def group(self) -> str:
        """Rows of one group stay in one split; here, the normalised prompt."""
        return normalise(self.prompt)


@dataclass(frozen=True)
class PromptRow(Row):
    """A prompt alone."""


@dataclass(frozen=True)
class PreferenceRow(Row):
    """Two answers to a prompt.

    Args:
        chosen: the better answer.
        rejected: the worse answer.
        margin: by how much, in score units; 0 where the data say nothing.
        aspects: capability name to 1 (chosen is better) or -1 (rejected is better); ties and unknowns are left out.
        preference: share of votes for chosen, ties half; None without votes.
        aspects_soft: capability name to the probability that chosen is better.
    """

    chosen: str
    rejected: str
    margin: float = 0.0
    aspects: Mapping[str, int] = field(default_factory=dict)
    preference: float | None = None
    aspects_soft: Mapping[str, float] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[str, ...]:
        """Chosen, then rejected."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class RankedRow(Row):
    """Several answers to a prompt with their ranks; 1 is best, equal ranks are ties."""

    responses: tuple[str, ...]
    rank: tuple[float, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """All responses, as the row orders them."""
        return self.responses

    def pairs(self) -> list[PreferenceRow]:
        """Return every pair of responses with unequal ranks, the better one as chosen."""
        ranked = zip(self.rank, self.responses, strict=True)
        better = [(a, b) for (i, a), (j, b) in permutations(ranked, 2) if i < j]
        return [PreferenceRow(self.origin, self.prompt, self.category, a, b) for a, b in better]


@dataclass(frozen=True)
class SFTRow(Row):
    """A prompt with the answer to imitate.

    Args:
        response: the answer.
        whole: the dialogue or text that the row was taken from, which never straddles two splits.
    """

    response: str
    whole: Prompt | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """The one response."""
        return (self.response,)

    @property
    def group(self) -> str:
        """The normalised prompt, or what it was taken from."""
        return normalise(self.prompt if self.whole is None else self.whole)


def normalise(prompt: Prompt) -> str:
    """Return the text of a prompt without differences of case, spacing and Unicode form."""
    text = prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(text: str) -> int:
    """Return a number that depends on the text alone, evenly spread over [0, 2^64)."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")


def preference_rows(record: Record) -> list[PreferenceRow]:
    """Parse a preference row, or a ranked row into its pairs."""
    if record.get("responses") is not None and record.get("chosen") is None:
        return ranked_row(record).pairs()
    prompt, chosen, rejected = _pair(record)
    return [
        PreferenceRow(
            record.origin,
            prompt,
            _category(record),
            chosen,
            rejected,
            _margin(record),
            _aspects(record),
            _preference(record),
            _aspects_soft(record),
        )
    ]


def ranked_row(record: Record) -> RankedRow:
    """Parse `prompt`, `responses`, `rank`."""
    prompt = _prompt(record)
    responses, rank = record.get("responses"), record.get("rank")
    if not isinstance(responses, list) or len(responses) < 2 or not all(map(_is_text, responses)):
        raise record.wrong("responses", "a list of at least two non-empty strings")
    if not isinstance(rank, list) or len(rank) != len(responses) or not all(map(_is_number, rank)):
        raise record.wrong("rank", f"a list of {len(responses)} numbers, 1 for the best")
    if len(set(rank)) == 1:
        raise record.wrong("rank", "at least two different ranks")
    return RankedRow(record.origin, prompt, _category(record), tuple(responses), tuple(map(float, rank)))


def prompt_rows(record: Record) -> list[PromptRow]:
    """Parse `prompt`; the answers of other row kinds are ignored."""
    implicit = record.get("prompt") is None and isinstance(record.get("chosen"), list)
    prompt = _pair(record)[0] if implicit else _prompt(record)
    return [PromptRow(record.origin, prompt, _category(record))]


def sft_rows(record: Record) -> list[SFTRow]:
    """Parse `messages` (each assistant turn becomes a row), `text`, `prompt` and `response`, or a preference row."""
    category = _category(record)
    if record.get("messages") is not None:
        return _dialogue(record, category)
    if record.get("chosen") is not None:
        return [SFTRow(r.origin, r.prompt, r.category, r.chosen) for r in preference_rows(record)]
    if record.get("text") is not None and record.get("prompt") is None:
        text = _text(record, "text")
        return [SFTRow(record.origin, "", category, text, whole=text)]
    if record.get("prompt") is None:
        raise record.wrong("prompt", "`prompt` with `response`, or `messages`, or `text`")
    return [SFTRow(record.origin, _prompt(record), category, _text(record, "response"))]


def _dialogue(record: Record, category: str | None) -> list[SFTRow]:
    turns = _messages(record, "messages")
    answered = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    if not answered:
        raise record.wrong("messages", "an assistant message that follows another message")
    empty = next((i for i in answered if not turns[i]["content"].strip()), None)
    if empty is not None:
        raise record.wrong("messages", f"a non-empty answer in message {empty + 1}")
    return [SFTRow(record.origin, turns[:i], category, turns[i]["content"], whole=turns) for i in answered]


def _pair(record: Record) -> tuple[Prompt, str, str]:
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        return _prompt(record), _text(record, "chosen"), _text(record, "rejected")
    left, right = _messages(record, "chosen"), _messages(record, "rejected")
    shared = 0
    while shared < min(len(left), len(right)) - 1 and left[shared] == right[shared]:
        shared += 1
    for key, turns in (("chosen", left), ("rejected", right)):
        answer = turns[shared:]
        if len(answer) != 1 or answer[0]["role"] != "assistant" or not answer[0]["content"].strip():
            raise record.wrong(key, "one non-empty assistant message after the messages that both answers share")
    prompt: Prompt = left[:shared] or _as_messages(_prompt(record))
    return prompt, left[-1]["content"], right[-1]["content"]


def _as_messages(prompt: Prompt) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _prompt(record: Record) -> Prompt:
    value = record.get("prompt")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise record.wrong("prompt", "a string or a list of messages")
    turns = _messages(record, "prompt")
    if turns[-1]["role"] == "assistant":
        raise record.wrong("prompt", "a last message that is not the assistant's")
    return turns


def _messages(record: Record, key: str) -> list[Message]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise record.wrong(key, "a non-empty list of messages, each with `role` and `content`")
    return [_message(record, key, turn, number) for number, turn in enumerate(value, 1)]


def _message(record: Record, key: str, turn: Any, number: int) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
    if role not in ROLES:
        raise record.wrong(key, f"message {number} to have a `role` of {', '.join(ROLES)}, not {role!r}")
    if not isinstance(content, str):
        raise record.wrong(key, f"message {number} to have a string as `content`")
    return {"role": role, "content": content}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not _is_text(value):
        raise record.wrong(key, "a non-empty string")
    return str(value)


def _category(record: Record) -> str | None:
    value = record.get("category")
    if value is None or isinstance(value, str):
        return value
    raise record.wrong("category", "a string")


def _margin(record: Record) -> float:
    value = record.get("margin")
    if value is None:
        return 0.0
    if not _is_number(value):
        raise record.wrong("margin", "a finite number")
    return float(value)


def _aspects(record: Record) -> dict[str, int]:
    value = record.get("aspects")
    if value is None:
        return {}
    if not isinstance(value, dict) or any(v not in (None, -1, 0, 1) for v in value.values()):
        raise record.wrong("aspects", "an object of names with 1, 0 or -1")
    return {str(name): int(v) for name, v in value.items() if v}


def _aspects_soft(record: Record) -> dict[str, float]:
    value = record.get("aspects_soft")
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(v is None or (_is_number(v) and 0 <= v <= 1) for v in value.values()):
        raise record.wrong("aspects_soft", "an object of names with probabilities from 0 to 1")
    return {str(name): float(v) for name, v in value.items() if v is not None}


def _preference(record: Record) -> float | None:
    value = record.get("votes")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise record.wrong("votes", "an object with the counts `chosen`, `rejected` and `tie`")
    counts = [value.get(side) or 0 for side in ("chosen", "rejected", "tie")]
    if not all(_is_number(n) and n >= 0 for n in counts) or not sum(counts):
        raise record.wrong("votes", "counts `chosen`, `rejected` and `tie` of at least 0, not all of them 0")
    return float((counts[0] + counts[2] / 2) / sum(counts))
