"""Prompts alone, for methods that sample their own responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_rlhf.data.base import DataModule
from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.examples import Example, SplitName
from lit_rlhf.data.rows import PromptRow, Record, prompt_rows
from lit_rlhf.encoding import Encoded
from lit_rlhf.types import Movable, Prompt, UserError

PromptExample = Example[PromptRow]


@dataclass(frozen=True)
class PromptBatch(Movable):
    """B prompts as the data gave them.

    Args:
        prompts: B strings or message lists.
        index: [B], row numbers in the data set: the global prompt index of a sample's generator.
        categories: B category names or None.
    """

    prompts: tuple[Prompt, ...]
    index: Tensor
    categories: tuple[str | None, ...]


def collate_prompts(items: Sequence[PromptExample], micro: MicroBatch) -> PromptBatch:
    """Make a batch of the prompts `micro.rows`."""
    rows = [items[row].row for row in micro.rows]
    return PromptBatch(tuple(r.prompt for r in rows), torch.tensor(micro.rows), tuple(r.category for r in rows))


class PromptData(DataModule[PromptRow, PromptBatch]):
    """Batches of prompts; rows of any kind with a `prompt` will do, and repeated prompts count once.

    Args:
        tokenizer: see `DataModule`, as for all other arguments.
        max_new_tokens: tokens of the window that a prompt must leave free for the response.
        options: see `DataModule`.
    """

    world_sizes: ClassVar[dict[SplitName, int]] = {"train": 2000, "validation": 200, "test": 200}

    def __init__(self, tokenizer: str = "builtin:policy", *, max_new_tokens: int = 64, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens

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
        return partial(collate_prompts, items)
