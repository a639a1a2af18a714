"""Which rows make up which optimizer step, on which rank, and where an interrupted run goes on.

The plan is one global order of rows, cut into optimizer steps of `batch_size * world_size * accumulate` rows. Inside a
step, rows are dealt to micro-batches and ranks. So the rows of a step, and with them the loss and the gradient, are the
same for two processes of batch 4, one of batch 8, and one of batch 1 accumulated 8 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lit_rlhf.types import Share, UserError

BatchT_co = TypeVar("BatchT_co", covariant=True)


@dataclass(frozen=True)
class MicroBatch:
    """The rows that one rank sees at once, and the divisors of their sums.

    Args:
        rows: row numbers in the data set, equally many of each stream, stream after stream.
        examples: see `lit_rlhf.types.Share`.
        tokens: see `lit_rlhf.types.Share`.
        streams: how many streams.
        epoch: in which they come.
    """

    rows: tuple[int, ...]
    examples: float
    tokens: float
    streams: int = 1
    epoch: int = 0

    @property
    def share(self) -> Share:
        """The divisors as tensors."""
        return Share(torch.tensor(self.examples), torch.tensor(self.tokens))


@dataclass(frozen=True)
class StepPlanner:
    """Plans an epoch for one rank.

    In training the order is a permutation from (seed, epoch). Lightning divides the loss of every micro-batch by
    `accumulate`, in the last step of an epoch too, where fewer micro-batches may be left, and averages over ranks. With
    share = total / (accumulate * world_size), loss_sum / share therefore adds up to the exact mean over the step:
    sum over ranks and micro-batches of loss_sum / share / accumulate / world_size = sum of loss_sum / total.
    The last step deals what is left evenly, so that each rank has equally many micro-batches; only if fewer rows than
    ranks are left are they dropped for this epoch (`dropped`). A micro-batch of two can occur there at batch size 1.
    `limit_train_batches` should be a multiple of `accumulate`: the plan does not know of a step cut short.

    Several streams are several orders of the same rows side by side in every micro-batch, each cut alike; the shares
    count the rows of all. Stream k is the permutation from (seed, epoch, k), whichever streams run beside it.

    In evaluation the order is that of the data, no row is dropped, and the share of a micro-batch is its own count.

    Args:
        tokens: response tokens of each row.
        batch_size: rows of each stream in a micro-batch on one rank; >= 1.
        world_size: number of ranks that split the data.
        rank: this one; 0 <= rank < world_size.
        accumulate: micro-batches of an optimizer step; >= 1.
        seed: of the order.
        training: training or evaluation, see above.
        streams: numbers of the orders, each >= 0; in evaluation there is one order.

    Raises:
        UserError: batch_size < 1, or fewer rows than ranks.
    """

    tokens: Sequence[int]
    batch_size: int
    world_size: int = 1
    rank: int = 0
    accumulate: int = 1
    seed: int = 0
    training: bool = True
    streams: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {self.batch_size}")
        if len(self.tokens) < self.world_size:
            raise UserError(f"{len(self.tokens)} rows cannot be shared by {self.world_size} processes")

    @property
    def rows_per_step(self) -> int:
        """Rows that a full optimizer step sees on all ranks; in evaluation all rows."""
        return self.batch_size * self.world_size * self.accumulate if self.training else len(self.tokens)

    @property
    def dropped(self) -> int:
        """Rows that each epoch leaves out because they are fewer than the ranks."""
        left = len(self.tokens) % self.rows_per_step
        return left if left < self.world_size else 0

    def __len__(self) -> int:
        steps, left = divmod(len(self.tokens), self.rows_per_step)
        return steps * self._micro_batches(self.rows_per_step) + self._micro_batches(left)

    def order(self, epoch: int, stream: int = 0) -> list[int]:
        """Return the global order of a stream's rows, the same on every rank."""
        if not self.training:
            return list(range(len(self.tokens)))
        order: list[int] = np.random.default_rng([self.seed, epoch, stream]).permutation(len(self.tokens)).tolist()
        return order

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """Return this rank's micro-batches in order."""
        streams = [self._cut(self.order(epoch, stream)) for stream in self.streams]
        return [replace(_side_by_side(parts), epoch=epoch) for parts in zip(*streams, strict=True)]

    def _cut(self, order: Sequence[int]) -> list[MicroBatch]:
        starts = range(0, len(order), self.rows_per_step)
        return [micro for start in starts for micro in self._step(order[start : start + self.rows_per_step])]

    def _micro_batches(self, rows: int) -> int:
        """Return how many micro-batches a rank makes of a step's rows: at most batch_size each, but none empty."""
        return min(math.ceil(rows / (self.world_size * self.batch_size)), rows // self.world_size)

    def _step(self, rows: Sequence[int]) -> list[MicroBatch]:
        parts = self._micro_batches(len(rows)) * self.world_size
        bounds = [len(rows) * part // parts for part in range(parts + 1)] if parts else []
        dealt = [tuple(rows[bounds[p] : bounds[p + 1]]) for p in range(self.rank, parts, self.world_size)]
        if not self.training:
            return [MicroBatch(part, len(part), self._count(part)) for part in dealt]
        divisor = self.accumulate * self.world_size
        return [MicroBatch(part, len(rows) / divisor, self._count(rows) / divisor) for part in dealt]

    def _count(self, rows: Sequence[int]) -> float:
        return float(sum(self.tokens[row] for row in rows))


def _side_by_side(parts: Sequence[MicroBatch]) -> MicroBatch:
    rows = tuple(row for part in parts for row in part.rows)
    return MicroBatch(rows, sum(p.examples for p in parts), sum(p.tokens for p in parts), len(parts))


class _Batches(Dataset[BatchT_co]):
    """A data set whose keys are micro-batches."""

    def __init__(self, make: Callable[[MicroBatch], BatchT_co]) -> None:
        self.make = make

    def __getitem__(self, micro: MicroBatch) -> BatchT_co:
        return self.make(micro)


class ResumableLoader(Generic[BatchT_co]):
    """Yields the planned batches, and goes on where a checkpoint left off.

    It is no `DataLoader` subclass: Lightning would replace the sampler of one in distributed runs, and leaves other
    iterables alone. It offers what Lightning looks for: a length, `state_dict` and `load_state_dict` for resuming
    inside an epoch, and `sampler.set_epoch`.

    Args:
        planner: which rows come when.
        make: turns a micro-batch into a batch; with workers it must be picklable.
        num_workers: processes that make batches ahead of time; 0 makes them in this process.
    """

    batch_sampler = None  # Lightning looks for it wherever there is a sampler

    def __init__(self, planner: StepPlanner, make: Callable[[MicroBatch], BatchT_co], num_workers: int = 0) -> None:
        self.planner = planner
        self.make = make
        self.num_workers = num_workers
        self._epoch = 0
        self._yielded = 0
        self._resuming = False

    @property
    def sampler(self) -> Self:
        """Lightning announces the epoch to `loader.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; a position loaded for another epoch is forgotten."""
        if epoch != self._epoch:
            self._epoch, self._yielded, self._resuming = epoch, 0, False

    def __len__(self) -> int:
        return len(self.planner)

    def __iter__(self) -> Iterator[BatchT_co]:
        # A generator starts at the first batch: Lightning asks for the iterator before it announces the epoch.
        if not self._resuming:
            self._yielded = 0
        self._resuming = False
        plan = self.planner.epoch(self._epoch)[self._yielded :]
        loader = DataLoader(
            _Batches(self.make),
            sampler=plan,  # with batch_size None each key of the sampler is one batch
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else every epoch would draw from the global generator
        )
        for batch in loader:
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the arithmetic under which it means something."""
        return {"epoch": self._epoch, "batches": self._yielded, "plan": self._plan()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position.

        Raises:
            UserError: the position lies inside an epoch that was planned with other numbers.
        """
        inside = 0 < state["batches"] < state["plan"]["micro_batches"]
        changed = [f"{k} {v} (now {self._plan()[k]})" for k, v in state["plan"].items() if v != self._plan()[k]]
        if inside and changed:
            raise UserError(
                f"the checkpoint was saved inside an epoch planned with {', '.join(changed)}; expected the same"
                " numbers, or a checkpoint from the end of an epoch"
            )
        finished = state["batches"] >= state["plan"]["micro_batches"]
        self._epoch = state["epoch"]
        self._yielded = len(self) if finished else state["batches"]
        self._resuming = True

    def _plan(self) -> dict[str, Any]:
        p = self.planner
        return {
            "rows": len(p.tokens),
            "batch_size": p.batch_size,
            "world_size": p.world_size,
            "accumulate": p.accumulate,
            "seed": p.seed,
            "streams": list(p.streams),
            "micro_batches": len(p),
        }
