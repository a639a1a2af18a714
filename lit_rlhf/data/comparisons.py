"""Comparisons that train experts: a pair as a whole, or a pair at one capability point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.preference import Pair
from lit_rlhf.data.rows import PreferenceRow
from lit_rlhf.encoding import Encoder
from lit_rlhf.types import ExpertBatch

HELD_OUT = "held out"  # the phase of batches that nothing is trained on


@dataclass(frozen=True)
class Item:
    """One comparison of a phase.

    Args:
        row: number of the pair among the training pairs.
        point: number of the capability point within the category; -1 for the pair as a whole.
        label: probability that the first response is the better one.
        first: which response comes first, 0 for `chosen`, 1 for `rejected`: the better one at a point.
        weight: 1 / items of the same prompt (and point), so that each prompt counts once.
    """

    row: int
    point: int
    label: float = 1.0
    first: int = 0
    weight: float = 1.0


def point_items(number: int, row: PreferenceRow, points: Sequence[str], *, soft: bool) -> Iterator[Item]:
    """Yield the comparisons of one pair at the points that it has labels for, the better response first.

    Args:
        number: of the pair.
        row: the pair.
        points: of its category, in order.
        soft: take `aspects_soft` as labels where there are any; 1/2 is a label too.
    """
    for k, name in enumerate(points):
        chance = row.aspects_soft.get(name) if soft else None
        if chance is not None:
            yield Item(number, k, max(chance, 1 - chance), first=int(chance < 0.5))
        elif name in row.aspects:
            yield Item(number, k, first=int(row.aspects[name] < 0))


def collate_experts(
    encoder: Encoder,
    pairs: Sequence[Pair],
    items: Sequence[Item],
    points: Mapping[str, tuple[str, ...]],
    phase: str,
    micro: MicroBatch,
) -> ExpertBatch:
    """Make a batch of the comparisons `micro.rows`: 2B rows, better ones first; questions outside training."""
    chosen = [items[number] for number in micro.rows]
    rows = [pairs[item.row] for item in chosen]
    order = {category: number for number, category in enumerate(points)}
    most = max(map(len, points.values()))
    aspects = torch.zeros(len(rows), most, dtype=torch.int64)
    for i, pair in enumerate(rows):
        for k, name in enumerate(points[pair.row.category or ""]):
            aspects[i, k] = pair.row.aspects.get(name, 0)
    asked = phase == HELD_OUT
    questions = encoder.collate(encoder.questions([pair.row.prompt for pair in rows])) if asked else None
    return ExpertBatch(
        phase=phase,
        sequences=encoder.collate(
            [pair.encoded[side ^ item.first] for side in (0, 1) for pair, item in zip(rows, chosen, strict=True)]
        ),
        category=torch.tensor([order[pair.row.category or ""] for pair in rows]),
        point=torch.tensor([item.point for item in chosen]),
        weight=torch.tensor([item.weight for item in chosen]),
        label=torch.tensor([item.label for item in chosen]),
        divisor=torch.tensor(micro.tokens),
        index=torch.tensor([item.row for item in chosen]),
        aspects=aspects,
        questions=questions,
        categories=tuple(pair.row.category for pair in rows),
    )


def weighted(pairs: Sequence[Pair], items: Sequence[Item]) -> list[Item]:
    """Weigh items so that those of one prompt (at one point) add up to 1."""
    keys = [(pairs[item.row].row.group, item.point) for item in items]
    count = Counter(keys)
    return [replace(item, weight=1 / count[key]) for item, key in zip(items, keys, strict=True)]
