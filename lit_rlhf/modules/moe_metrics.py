"""What is measured of a DMoERM: accuracies by category and point, and the scale of its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_rlhf.models.moe import Inner, MoE
from lit_rlhf.types import ExpertBatch

PAIRS, RIGHT, COUNT, TOTAL, SQUARES = range(5)


class MoEMetrics:
    """Sums over held-out pairs, added up over all ranks when they are read. Ties count half.

    Args:
        points: category to its capability points, in order.
    """

    def __init__(self, points: Mapping[str, Sequence[str]]) -> None:
        self.points = {category: tuple(names) for category, names in points.items()}
        self.reset()

    def reset(self) -> None:
        """Forget everything; tables [5, C] of scores and [5, C, K] of points, in float64."""
        most = max(map(len, self.points.values()))
        self._category = torch.zeros(5, len(self.points), dtype=torch.float64)
        self._point = torch.zeros(5, len(self.points), most, dtype=torch.float64)

    @torch.no_grad()
    def update(self, batch: ExpertBatch, raw: Tensor, points: Tensor | None) -> None:
        """Add raw scores [2B], chosen first, and those of the points, [2B, K], NaN where a category has no such one."""
        category = batch.category.cpu()
        self._category += _table(raw.double().cpu(), torch.ones_like(category), category, len(self.points))
        if points is None:
            return
        aspects = batch.aspects.cpu()
        for k in range(points.shape[1]):
            found = points[:, k].double().cpu()
            there = ~found[: len(category)].isnan()
            both = found[there.repeat(2)]
            self._point[:, :, k] += _table(both, aspects[there, k], category[there], len(self.points))

    def compute(self) -> dict[str, Tensor]:
        """Return accuracies by category and by point, where there was anything to be right about."""
        scores, points = self._reduced()
        found = {}
        for c, (category, names) in enumerate(self.points.items()):
            if scores[PAIRS, c]:
                found[f"moe/accuracy/{category}"] = scores[RIGHT, c] / scores[PAIRS, c]
            for k, name in enumerate(names):
                if points[PAIRS, c, k]:
                    found[f"moe/point_accuracy/{category}/{name}"] = points[RIGHT, c, k] / points[PAIRS, c, k]
        return {name: value.float() for name, value in found.items()}

    def keep_scale(self, moe: MoE, inner: Inner) -> None:
        """Keep mean and spread of all held-out responses with the model, by category and by point."""
        scores, points = self._reduced()
        for c, names in enumerate(self.points.values()):
            if scores[COUNT, c]:
                moe.set_scale(inner, c, *_moments(scores[:, c]))
            for k in range(len(names)):
                if points[COUNT, c, k]:
                    mean, std = _moments(points[:, c, k])
                    place = int(moe.offsets[c]) + k
                    moe.point_mean[place], moe.point_std[place] = mean, std if std > 0 else 1.0

    def _reduced(self) -> tuple[Tensor, Tensor]:
        tables = (self._category.clone(), self._point.clone())
        if dist.is_available() and dist.is_initialized():
            device: Any = "cuda" if dist.get_backend() == "nccl" else "cpu"
            tables = tuple(table.to(device) for table in tables)  # type: ignore[assignment]
            for table in tables:
                dist.all_reduce(table)
        return tables[0].cpu(), tables[1].cpu()


def _table(scores: Tensor, better: Tensor, category: Tensor, count: int) -> Tensor:
    """Sum by category, [5, C]: pairs with a label, those ordered rightly, responses, their scores and the squares.

    Args:
        scores: [2B], chosen first.
        better: [B], 1 where chosen is the better one, -1 where rejected is, 0 where nobody knows.
        category: [B].
        count: C.
    """
    chosen, rejected = scores.chunk(2)
    right = ((chosen - rejected).sign() * better + 1) / 2
    labelled = (better != 0).double()
    columns = [labelled, labelled * right, torch.full_like(chosen, 2.0), chosen + rejected]
    columns.append(chosen.square() + rejected.square())
    return torch.zeros(5, count, dtype=torch.float64).index_add_(1, category, torch.stack(columns))


def _moments(column: Tensor) -> tuple[float, float]:
    mean = (column[TOTAL] / column[COUNT]).item()
    return mean, max(column[SQUARES].item() / column[COUNT].item() - mean**2, 0.0) ** 0.5
