"""The built-in world: seeded prompts, preference pairs, ranked lists and SFT rows with an exact gold reward.

No files and no network: rows are plain dicts in the package's row format, and the same seed gives the same rows. The
language is in `world_language`, the gold reward in `world_gold`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from lit_rlhf.data.world_gold import ASPECTS, WorldGold, aspect_values, gold_reward, weighted_sum
from lit_rlhf.data.world_language import CATEGORIES, build_tokenizer, draw_prompt, draw_response

__all__ = ["ASPECTS", "CATEGORIES", "Split", "World", "WorldGold", "build_tokenizer", "gold_reward"]

Split = Literal["train", "validation", "test"]
Row = dict[str, Any]

_SPLITS: dict[Split, range] = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
_LABEL_GAP = 0.1  # aspects closer than this are labelled 0, unknown


@dataclass(frozen=True)
class World:
    """A seeded source of rows; row i depends on the seed, the split, the kind of row and i alone.

    Prompts belong to splits by a checksum of their text, so splits are disjoint whatever the seed.

    Args:
        seed: any integer.
    """

    seed: int = 0

    def prompts(self, n: int, split: Split = "train") -> list[Row]:
        """Draw n different prompts as `prompt`, `category`.

        Raises:
            ValueError: n is more than 40,000 in train or 4,000 elsewhere.
        """
        most = 40_000 if split == "train" else 4_000
        if n > most:
            raise ValueError(f"n must be at most {most} in split {split!r}, got {n}")
        rng, found = self._rng("prompts", split), dict[str, str]()
        while len(found) < n:
            prompt, category = draw_prompt(rng)
            if _belongs(prompt, split):
                found[prompt] = category
        return [{"prompt": prompt, "category": category} for prompt, category in found.items()]

    def sft_rows(self, n: int, split: Split = "train") -> list[Row]:
        """Draw n prompts with one response each as `prompt`, `response`, `category`."""
        return [
            {"prompt": prompt, "response": draw_response(rng, prompt), "category": category}
            for rng, prompt, category in self._drawn("sft", n, split)
        ]

    def preference_rows(self, n: int, noise: float | None = None, split: Split = "train") -> list[Row]:
        """Draw n pairs of two independent responses, labelled by gold, some labels then flipped.

        Exactly round(noise x n) labels are flipped, chosen by a generator of their own, and a flipped row says so.
        `aspects` (1: the row's `chosen` is better, -1: worse, 0: about equal) and `gold` stay true in flipped rows.

        Args:
            n: rows.
            noise: share of flipped labels in [0, 1]; None is 0.25 in train and 0 elsewhere.
            split: where the prompts come from.

        Raises:
            ValueError: `noise` is outside [0, 1].
        """
        share = (0.25 if split == "train" else 0.0) if noise is None else noise
        if not 0 <= share <= 1:
            raise ValueError(f"noise must be in [0, 1], got {share}")
        flipped = set(self._rng("noise", split).sample(range(n), round(share * n)))
        return [
            _pair(rng, prompt, category, flipped=index in flipped)
            for index, (rng, prompt, category) in enumerate(self._drawn("preference", n, split))
        ]

    def ranked_rows(self, n: int, m: int = 4, split: Split = "train") -> list[Row]:
        """Draw n prompts with m responses each as `prompt`, `responses`, `rank` (1 is best by gold), `category`."""
        rows = []
        for rng, prompt, category in self._drawn("ranked", n, split):
            drawn = _distinct(rng, prompt, m)
            order = sorted((gold for _, _, gold in drawn), reverse=True)
            rank = [1 + order.index(gold) for _, _, gold in drawn]
            rows.append({"prompt": prompt, "responses": [row[0] for row in drawn], "rank": rank, "category": category})
        return rows

    def _rng(self, *key: str | int) -> Random:
        return Random("/".join(map(str, (self.seed, *key))))  # noqa: S311  # strings seed the same on every machine

    def _drawn(self, kind: str, n: int, split: Split) -> Iterator[tuple[Random, str, str]]:
        for index in range(n):
            rng = self._rng(kind, split, index)
            prompt, category = draw_prompt(rng)
            while not _belongs(prompt, split):
                prompt, category = draw_prompt(rng)
            yield rng, prompt, category


def _belongs(prompt: str, split: Split) -> bool:
    return zlib.crc32(prompt.encode()) % 10 in _SPLITS[split]


def _distinct(rng: Random, prompt: str, m: int) -> list[tuple[str, dict[str, float], float]]:
    """Draw m responses without ties in gold, each with its aspects and its gold."""
    found: dict[float, tuple[str, dict[str, float], float]] = {}
    while len(found) < m:
        response = draw_response(rng, prompt)
        values = aspect_values(prompt, response)
        gold = weighted_sum(prompt, values)
        found.setdefault(gold, (response, values, gold))
    return list(found.values())


def _pair(rng: Random, prompt: str, category: str, *, flipped: bool) -> Row:
    first, second = _distinct(rng, prompt, 2)
    chosen, rejected = (first, second) if (first[2] > second[2]) != flipped else (second, first)
    gaps = {name: chosen[1][name] - rejected[1][name] for name in ASPECTS}
    return {
        "prompt": prompt,
        "chosen": chosen[0],
        "rejected": rejected[0],
        "category": category,
        "aspects": {name: 0 if abs(gap) < _LABEL_GAP else (1 if gap > 0 else -1) for name, gap in gaps.items()},
        "flipped": flipped,
        "gold": {"chosen": chosen[2], "rejected": rejected[2]},
    }
