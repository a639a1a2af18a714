"""Demonstrations: prompts with the response to imitate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from lit_rlhf.data.base import DataModule
from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.examples import Example, SplitName
from lit_rlhf.data.rows import Record, SFTRow, sft_rows
from lit_rlhf.encoding import Encoder
from lit_rlhf.types import SequenceBatch

Demonstration = Example[SFTRow]


def collate_demonstrations(encoder: Encoder, items: Sequence[Demonstration], micro: MicroBatch) -> SequenceBatch:
    """Make a batch of the rows `micro.rows`."""
    sequences = encoder.collate([items[row].encoded[0] for row in micro.rows])
    return SequenceBatch(sequences, micro.share, torch.tensor(micro.rows))


class SFTData(DataModule[SFTRow, SequenceBatch]):
    """Batches of demonstrations, with the loss on the response alone.

    Rows hold `prompt` and `response`, or `messages` (each assistant turn becomes an example that follows all messages
    before it), or `text` (all of it counts), or a preference pair, of which the chosen answer is taken.
    """

    world_sizes: ClassVar[dict[SplitName, int]] = {"train": 8000, "validation": 1000, "test": 1000}

    def parse(self, record: Record) -> list[SFTRow]:
        """Check a row of any of these kinds."""
        return sft_rows(record)

    def world_rows(self, n: int, split: SplitName) -> list[dict[str, Any]]:
        """Return prompts with responses of mixed quality."""
        from lit_rlhf.data.synthetic import World

        return World().sft_rows(n, split=split)

    def batch_maker(self, items: Sequence[Demonstration]) -> Callable[[MicroBatch], SequenceBatch]:
        """Make `SequenceBatch`es."""
        return partial(collate_demonstrations, self.encoder, items)
