"""Encoded rows of one split: which were kept, which were dropped and why, and which go to which split."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Generic, Literal, TypeVar

from lit_rlhf.data.rows import Row, digest
from lit_rlhf.encoding import Encoded, Encoder
from lit_rlhf.types import UserError

RowT = TypeVar("RowT", bound=Row)
SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example(Generic[RowT]):
    """A row with the encoding of each of its answers."""

    row: RowT
    encoded: tuple[Encoded, ...]

    @property
    def tokens(self) -> int:
        """Response tokens of all answers."""
        return sum(row.response_length for row in self.encoded)


@dataclass(frozen=True)
class Examples(Generic[RowT]):
    """The usable rows of a split, and what became of the others.

    Args:
        items: usable rows, in the order of the data.
        dropped: reason to number of rows.
    """

    items: tuple[Example[RowT], ...]
    dropped: Counter[str]

    @property
    def truncated(self) -> int:
        """Responses that lost something at the window."""
        return sum(row.truncated for example in self.items for row in example.encoded)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids and prompt lengths in order: whatever depends on the tokens alone may be kept under it."""
        seen = sha256()
        for example in self.items:
            for row in example.encoded:
                seen.update(array("q", (row.prompt_length, len(row.ids), *row.ids)).tobytes())
            if not example.encoded:
                seen.update(repr(example.row.prompt).encode())
        return seen.hexdigest()

    def summary(self) -> str:
        """Say how many rows were read, kept, dropped and cut."""
        dropped = self.dropped.total()
        reasons = f" ({_counts(self.dropped)})" if dropped else ""
        read = f"{len(self.items) + dropped:,} rows read, {len(self.items):,} kept, {dropped:,} dropped{reasons}"
        return f"{read}, {self.truncated:,} responses cut at the window"

    def first(self, encoder: Encoder) -> Iterator[str]:
        """Show the first example as the model meets it, with what counts for the loss in brackets."""
        for row in self.items[0].encoded:
            prompt, response = row.ids[: row.prompt_length], row.ids[row.prompt_length :]
            decode = encoder.tokenizer.decode
            yield f"first example, {self.items[0].row.origin}: {decode(prompt)!r} [{decode(response)!r}]"


def select(
    rows: Sequence[RowT],
    encoded: Sequence[tuple[Encoded, ...] | None],
    encoder: Encoder,
    unusable: Callable[[Example[RowT]], str | None],
    *,
    refuse_long: bool,
) -> Examples[RowT]:
    """Keep the rows that can be used, and count the others.

    Args:
        rows: of one split.
        encoded: the encodings of each row; None where its prompt leaves too little of the window.
        encoder: what made them.
        unusable: says why an encoded row cannot be used; None where it can.
        refuse_long: stop at such a prompt.

    Raises:
        UserError: such a prompt occurs and `refuse_long`, or no row is left.
    """
    items: list[Example[RowT]] = []
    dropped = Counter[str]()
    for row, answers in zip(rows, encoded, strict=True):
        if answers is None:
            if refuse_long:
                raise UserError(_too_long(row, encoder))
            dropped[f"the prompt leaves too little of the window, {encoder.max_length} tokens, for a response"] += 1
            continue
        example = Example(row, answers)
        reason = unusable(example)
        if reason is None:
            items.append(example)
        else:
            dropped[reason] += 1
    if not items:
        detail = _too_long(rows[0], encoder) if encoded[0] is None else f"{rows[0].origin} is the first"
        raise UserError(f"none of {len(rows)} rows can be used ({_counts(dropped)}): {detail}")
    return Examples(tuple(items), dropped)


def held_out_groups(groups: set[str], fraction: float) -> set[str]:
    """Choose groups by the hash of their text: about a fraction of them, at least one, and not all.

    A group's side depends on its own text alone, except where that would leave one side empty. Empty for one group.
    """
    ordered = sorted(groups, key=digest)
    count = sum(digest(group) < fraction * 2**64 for group in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def _counts(dropped: Counter[str]) -> str:
    return "; ".join(f"{count:,} x {reason}" for reason, count in dropped.items())


def _too_long(row: Row, encoder: Encoder) -> str:
    count = len(encoder.prompt(row.prompt))
    window = f"expected a prompt that leaves room for a response in the window of {encoder.max_length} tokens"
    return f"{row.origin}: `prompt` has {count} tokens; {window}"
