"""A judge's answers on disk: one line each, written as it arrives, so that nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lit_rlhf import records
from lit_rlhf.errors import UserError
from lit_rlhf.judge.question import chances, verdict

CUT = ("length", "content_filter")  # ends of an answer that is not whole


class BrokenAnswerError(ValueError):
    """A body that is no chat completion."""


@dataclass(frozen=True)
class Answer:
    """What a judge said.

    Args:
        text: all of it; empty where it declined.
        finish: why it ended, in the server's words.
        tokens_in: tokens of the question; None where the server does not count.
        tokens_out: tokens of the answer; None where the server does not count.
        chances: probabilities of "A", "B" and "tie"; None without log-probabilities.
    """

    text: str
    finish: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    chances: dict[str, float] | None = None

    @property
    def verdict(self) -> str | None:
        """The answer's "A", "B" or "tie"; None where it is cut or does not end as asked."""
        return None if self.finish in CUT else verdict(self.text)

    def says(self, *, swapped: bool) -> int | None:
        """Return 1 for chosen, -1 for rejected, 0 for a tie, None without verdict; swapped: chosen was reply B."""
        found = {"A": 1, "B": -1, "tie": 0}.get(self.verdict or "")
        return -found if found is not None and swapped else found

    def chance(self, *, swapped: bool) -> float | None:
        """Return the probability that chosen is better, a tie counting half; 1, 0 or 1/2 without log-probabilities."""
        said = self.says(swapped=swapped)
        if said is None or self.chances is None:
            return None if said is None else (said + 1) / 2
        return self.chances["B" if swapped else "A"] + self.chances["tie"] / 2


def parse(body: Any) -> Answer:
    """Return the answer in the body of a chat completion.

    Raises:
        BrokenAnswerError: the body has another shape.
    """
    try:
        choice = body["choices"][0]
        text, usage = choice["message"].get("content"), body.get("usage") or {}
        finish = "content_filter" if choice["message"].get("refusal") else choice.get("finish_reason")
        tokens = (choice.get("logprobs") or {}).get("content") or []
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BrokenAnswerError(f"no chat completion: {body}") from error
    if not isinstance(text, str | None) or not all(isinstance(count, int | None) for count in counts):
        raise BrokenAnswerError(f"no chat completion: {body}")
    try:
        found = chances(text or "", tokens)
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenAnswerError(f"log-probabilities of another shape: {tokens}") from error
    return Answer(text or "", str(finish) if finish is not None else None, counts[0], counts[1], found)


class AnswerFile:
    """The answers of a JSONL file by their key; `add` writes at once. A torn last line is dropped and asked again.

    Args:
        path: the file, made where it is missing.

    Raises:
        UserError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        records.append(path, [])  # makes the file, and mends a torn last line
        self.path = path
        self._found = {entry.pop("key", None): _answer(path, entry) for entry in records.read(path)}
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, key: str) -> Answer | None:
        """Return the answer to a question; None if it was never answered."""
        return self._found.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer, on disk first."""
        self._file.write(json.dumps({"key": key} | asdict(answer), ensure_ascii=False) + "\n")
        self._file.flush()
        self._found[key] = answer


def _answer(path: Path, entry: Mapping[str, Any]) -> Answer:
    try:
        return Answer(**entry)
    except TypeError as error:
        raise UserError(f"{path}: holds {str(dict(entry))[:80]!r}; expected the answers of a judge") from error
