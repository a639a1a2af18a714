"""Sums and lists over all processes; a run of one process needs no process group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_rlhf.functional.sequence import masked_moments


def distributed() -> bool:
    """Say whether there is a process group to talk over."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if distributed() else 1


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if distributed() else 0


def summed(table: Tensor) -> Tensor:
    """Return the sum over processes of equally shaped tensors; call it on all of them."""
    total = table.clone()
    if distributed():
        dist.all_reduce(total)
    return total


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes, by rank; call it on all of them."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def means(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Return means over the examples of all processes, in one collective.

    Args:
        columns: name to any shape, this process's examples; the names are the same on all processes.
    """
    if not columns:
        return {}
    first = next(iter(columns.values()))
    wide = torch.float32 if first.device.type == "mps" else torch.float64
    sums = torch.stack([column.detach().to(wide).sum() for column in columns.values()])
    counts = torch.stack([sums.new_tensor(column.numel()) for column in columns.values()])
    totals, numbers = summed(torch.stack([sums, counts])).unbind()
    return dict(zip(columns, (totals / numbers.clamp_min(1)).tolist(), strict=True))


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, sum and sum of squares over all processes."""
    count, total, squares = masked_moments(x, mask)
    table = summed(torch.stack([count.expand_as(total), total, squares]))
    return table[0].flatten()[0], table[1], table[2]
