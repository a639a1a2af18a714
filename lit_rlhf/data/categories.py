"""Prompts with their category, for a router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from lit_rlhf.data.base import DataModule
from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.examples import Example, SplitName
from lit_rlhf.data.rows import PromptRow, Record, prompt_rows
from lit_rlhf.encoding import Encoded, Encoder
from lit_rlhf.types import CategoryBatch, UserError

Question = Example[PromptRow]


def collate_questions(
    encoder: Encoder, items: Sequence[Question], numbers: dict[str, int], micro: MicroBatch
) -> CategoryBatch:
    """Make a batch of the prompts `micro.rows`."""
    rows = [items[row] for row in micro.rows]
    return CategoryBatch(
        sequences=encoder.collate([row.encoded[0] for row in rows]),
        label=torch.tensor([numbers[row.row.category or ""] for row in rows]),
        share=micro.share,
        index=torch.tensor(micro.rows),
    )


class CategoryData(DataModule[PromptRow, CategoryBatch]):
    """Batches of prompts, the user's turns alone, labelled by their category.

    Rows of any kind with a `prompt` will do; repeated prompts count once, and rows without a listed category are left
    out and counted.

    Args:
        tokenizer: see `DataModule`, as for all other arguments.
        categories: names in the order of the labels; None takes all that occur in the training rows, sorted.
        options: see `DataModule`.
    """

    world_sizes: ClassVar[dict[SplitName, int]] = {"train": 2000, "validation": 500, "test": 500}

    def __init__(
        self, tokenizer: str = "builtin:policy", *, categories: list[str] | None = None, **options: Any
    ) -> None:
        super().__init__(tokenizer, **options)
        if categories is not None and len(set(categories)) != len(categories):
            raise UserError(f"categories must be different names, got {categories}")
        self._categories = categories

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """Names in the order of the labels.

        Raises:
            UserError: fewer than two.
        """
        named = self._categories
        found = tuple(named or sorted({row.category for row in self._split("train") if row.category is not None}))
        if len(found) < 2:
            raise UserError(
                f"a router chooses among at least two categories; the training rows' `category` names {list(found)}"
            )
        return found

    def parse(self, record: Record) -> list[PromptRow]:
        """Check `prompt` and `category`, and ignore the rest."""
        return prompt_rows(record)

    def world_rows(self, n: int, split: SplitName) -> list[dict[str, Any]]:
        """Return different prompts."""
        from lit_rlhf.data.synthetic import World

        return World().prompts(n, split=split)

    def encode(self, rows: Sequence[PromptRow]) -> list[tuple[Encoded, ...] | None]:
        """Encode the user's turns; long ones keep their end."""
        return [(row,) for row in self.encoder.questions([row.prompt for row in rows])]

    def judge(self) -> Callable[[Question], str | None]:
        """Drop rows without a listed category, and prompts that occurred before."""
        seen: set[str] = set()

        def unusable(example: Question) -> str | None:
            if example.row.category not in self.categories:
                return "no category" if example.row.category is None else "a category that is not listed"
            known = example.row.group in seen
            seen.add(example.row.group)
            return "the prompt occurred before" if known else None

        return unusable

    def batch_maker(self, items: Sequence[Question]) -> Callable[[MicroBatch], CategoryBatch]:
        """Make `CategoryBatch`es."""
        numbers = {name: number for number, name in enumerate(self.categories)}
        return partial(collate_questions, self.encoder, items, numbers)
