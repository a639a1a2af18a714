"""Prompts alone, for methods that sample their own responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_rlhf.data.base import DataModule, Sources
from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.examples import Example, SplitName
from lit_rlhf.data.rows import PromptRow, Record, prompt_rows
from lit_rlhf.data.sft import Demonstration, SFTData, collate_demonstrations
from lit_rlhf.encoding import Encoded, Encoder
from lit_rlhf.types import Movable, Prompt, SequenceBatch, UserError

PromptExample = Example[PromptRow]


@dataclass(frozen=True)
class PromptBatch(Movable):
    """B prompts as the data gave them.

    Args:
        prompts: B strings or message lists.
        index: [B], row numbers in the data set: the global prompt index of a sample's generator.
        categories: B category names or None.
        sft: B demonstrations to mix into the loss, where the data module has any; its share counts these rows alone.
    """

    prompts: tuple[Prompt, ...]
    index: Tensor
    categories: tuple[str | None, ...]
    sft: SequenceBatch | None = None


@dataclass(frozen=True)
class Demonstrations:
    """What goes with the prompts: in epoch e, prompt i of N takes demonstration i + e N, round and round.

    Args:
        items: the demonstrations.
        encoder: makes ids of them.
        prompts: N.
    """

    items: Sequence[Demonstration]
    encoder: Encoder
    prompts: int

    def beside(self, micro: MicroBatch) -> SequenceBatch:
        """Return as many demonstrations as the micro-batch has rows."""
        rows = tuple((row + micro.epoch * self.prompts) % len(self.items) for row in micro.rows)
        tokens = sum(self.items[row].tokens for row in rows)
        return collate_demonstrations(self.encoder, self.items, MicroBatch(rows, len(rows), tokens))


def collate_prompts(
    items: Sequence[PromptExample], demonstrations: Demonstrations | None, micro: MicroBatch
) -> PromptBatch:
    """Make a batch of the prompts `micro.rows`."""
    rows = [items[row].row for row in micro.rows]
    sft = None if demonstrations is None else demonstrations.beside(micro)
    return PromptBatch(tuple(r.prompt for r in rows), torch.tensor(micro.rows), tuple(r.category for r in rows), sft)


class PromptData(DataModule[PromptRow, PromptBatch]):
    """Batches of prompts; rows of any kind with a `prompt` will do, and repeated prompts count once.

    Args:
        tokenizer: see `DataModule`, as for all other arguments.
        max_new_tokens: tokens of the window that a prompt must leave free for the response.
        sft: demonstrations that go with the prompts, as many in every batch, for an SFT term in the loss (Ouyang et al.
            2022, arXiv:2203.02155, PPO-ptx); sources and rows as for `SFTData`.
        options: see `DataModule`.
    """

    world_sizes: ClassVar[dict[SplitName, int]] = {"train": 2000, "validation": 200, "test": 200}

    def __init__(
        self,
        tokenizer: str = "builtin:policy",
        *,
        max_new_tokens: int = 64,
        sft: Sources | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
        self.max_new_tokens, self.sft = max_new_tokens, sft

    def parse(self, record: Record) -> list[PromptRow]:
        """Check `prompt` and ignore the rest."""
        return prompt_rows(record)

    def world_rows(self, n: int, split: SplitName) -> list[dict[str, Any]]:
        """Return different prompts."""
        from lit_rlhf.data.synthetic import World

        return World().prompts(n, split=split)

    def encode(self, rows: Sequence[PromptRow]) -> list[tuple[Encoded, ...] | None]:
        """Only measure the prompts: nothing is encoded, and None marks a prompt that leaves too little room."""
        room = self.encoder.max_length - self.max_new_tokens
        return [() if len(ids) <= room else None for ids in self.encoder.prompts([row.prompt for row in rows])]

    def judge(self) -> Callable[[PromptExample], str | None]:
        """Drop prompts that occurred before."""
        seen: set[str] = set()

        def repeated(example: PromptExample) -> str | None:
            known = example.row.group in seen
            seen.add(example.row.group)
            return "the prompt occurred before" if known else None

        return repeated

    def batch_maker(self, items: Sequence[PromptExample]) -> Callable[[MicroBatch], PromptBatch]:
        """Make `PromptBatch`es."""
        demonstrations = Demonstrations(self.demonstrations, self.encoder, len(items)) if self.demonstrations else None
        return partial(collate_prompts, items, demonstrations)

    @cached_property
    def demonstrations(self) -> tuple[Demonstration, ...]:
        """The encoded rows of `sft`; empty without it."""
        if self.sft is None:
            return ()
        data = SFTData(
            self.tokenizer,
            train=self.sft,
            joiner=self.joiner,
            max_length=self.max_length,
            validation_fraction=0.0,
            long_prompts=self.long_prompts,
            limit=self.limit,
            trust_remote_code=self.trust_remote_code,
        )
        return data.examples("train").items
