"""Preference pairs: two answers to a prompt, one of them preferred."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from lit_rlhf.data.base import DataModule
from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.examples import Example, SplitName
from lit_rlhf.data.rows import PreferenceRow, Record, preference_rows
from lit_rlhf.encoding import Encoder
from lit_rlhf.types import PreferenceBatch, numbered

Pair = Example[PreferenceRow]


def without_difference(pair: Pair) -> str | None:
    """Say so where both answers are the same tokens, from the start or after the cut at the window."""
    chosen, rejected = pair.encoded
    return "chosen and rejected are the same tokens" if chosen.ids == rejected.ids else None


def collate_pairs(encoder: Encoder, items: Sequence[Pair], soft_labels: bool, micro: MicroBatch) -> PreferenceBatch:
    """Make a batch of the pairs `micro.rows`: 2B rows, chosen rows first, in each stream."""
    pairs = [items[row] for row in micro.rows]
    size = len(pairs) // micro.streams
    streams = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    soft = [pair.row.preference if soft_labels else None for pair in pairs]
    return PreferenceBatch(
        sequences=encoder.collate([pair.encoded[side] for stream in streams for side in (0, 1) for pair in stream]),
        label=torch.tensor([1.0 if p is None else p for p in soft]),
        margin=torch.tensor([pair.row.margin for pair in pairs]),
        share=micro.share,
        index=torch.tensor(micro.rows),
        categories=tuple(pair.row.category for pair in pairs),
        streams=micro.streams,
    )


class PreferenceData(DataModule[PreferenceRow, PreferenceBatch]):
    """Batches of pairs from preference rows, or from ranked rows (every pair of unequal ranks).

    Args:
        tokenizer: see `DataModule`, as for all other arguments.
        soft_labels: take the share of `votes` for chosen as the label of a pair, ties half; 1 without votes.
        streams: how many orders of the training rows every batch holds side by side, or their numbers; an ensemble
            takes one for each member. Validation has one.
        options: see `DataModule`.

    Raises:
        UserError: no stream, a number twice, or one below 0.
    """

    world_sizes: ClassVar[dict[SplitName, int]] = {"train": 8000, "validation": 1000, "test": 1000}

    def __init__(
        self,
        tokenizer: str = "builtin:policy",
        *,
        soft_labels: bool = False,
        streams: int | list[int] = 1,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self.soft_labels = soft_labels
        self.stream_numbers = numbered("streams", streams)

    def parse(self, record: Record) -> list[PreferenceRow]:
        """Check a preference or ranked row."""
        return preference_rows(record)

    def world_rows(self, n: int, split: SplitName) -> list[dict[str, Any]]:
        """Return noisy training pairs, or clean ones in the other splits."""
        from lit_rlhf.data.synthetic import World

        return World().preference_rows(n, split=split)

    def judge(self) -> Callable[[Pair], str | None]:
        """Drop pairs without a difference to learn from."""
        return without_difference

    def batch_maker(self, items: Sequence[Pair]) -> Callable[[MicroBatch], PreferenceBatch]:
        """Make `PreferenceBatch`es."""
        return partial(collate_pairs, self.encoder, items, self.soft_labels)
