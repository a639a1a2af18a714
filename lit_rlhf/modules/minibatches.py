"""Which rows of a rollout make up which minibatch, on which process, in how many passes.

The minibatches of an update are cuts of one order of all rows, drawn from (seed, update, epoch) and the rows' numbers
in the data set. So they hold the same rows for any number of processes, and each process takes the ones it sampled. How
many passes a minibatch takes is the most that any process needs; the others run rows that count for nothing, because
sharded models gather their weights in step. All of it is known from one exchange at the start of the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lit_rlhf.modules.reduce import gathered, rank


@dataclass(frozen=True)
class Pass:
    """Rows that a process runs at once.

    Args:
        rows: positions in the process's own rollout; at least one.
        counts: False where the pass only keeps step with other processes.
    """

    rows: tuple[int, ...]
    counts: bool = True


@dataclass(frozen=True)
class Minibatch:
    """The rows behind one optimizer step.

    Args:
        passes: those of this process; equally many on all.
        rows: rows on all processes.
        tokens: their response tokens.
        extra_tokens: tokens of whatever else comes with the rows (demonstrations).
    """

    passes: tuple[Pass, ...]
    rows: int
    tokens: int
    extra_tokens: int = 0


@dataclass(frozen=True)
class _Row:
    number: int
    rank: int
    position: int
    tokens: int
    extra_tokens: int


@dataclass(frozen=True)
class RowTable:
    """Every process's rows of one rollout.

    Args:
        rows: all of them, in the order of their numbers.
        rank: this process.
        ranks: number of processes.
    """

    rows: tuple[_Row, ...]
    rank: int = 0
    ranks: int = 1

    @classmethod
    def gather(cls, index: Tensor, tokens: Tensor, extra_tokens: Tensor | None = None) -> RowTable:
        """Exchange row numbers and token counts, [B] each, with all processes."""
        extra = [0] * len(index) if extra_tokens is None else extra_tokens.tolist()
        parts = gathered(list(zip(index.tolist(), tokens.tolist(), extra, strict=True)))
        rows = [_Row(n, r, i, t, e) for r, part in enumerate(parts) for i, (n, t, e) in enumerate(part)]
        return cls(tuple(sorted(rows, key=lambda row: (row.number, row.rank, row.position))), rank(), len(parts))

    @property
    def tokens(self) -> int:
        """Response tokens on all processes."""
        return sum(row.tokens for row in self.rows)

    @property
    def most(self) -> int:
        """Rows of the process that has most."""
        return max(sum(row.rank == r for row in self.rows) for r in range(self.ranks))

    def minibatches(self, order: Sequence[int], count: int, size: int | None = None) -> list[Minibatch]:
        """Cut the rows into minibatches.

        Args:
            order: seed of the order: (seed, update, epoch), each >= 0.
            count: minibatches; fewer where there are fewer rows.
            size: rows in a pass at most; None runs all rows that a process has in a minibatch at once.
        """
        shuffled = np.random.default_rng(list(order)).permutation(len(self.rows))
        cuts = np.array_split(shuffled, min(count, len(self.rows)))
        return [self._minibatch([self.rows[i] for i in cut], size) for cut in cuts]

    def _minibatch(self, rows: Sequence[_Row], size: int | None) -> Minibatch:
        own = [[row.position for row in rows if row.rank == r] for r in range(self.ranks)]
        return Minibatch(
            tuple(passes(own[self.rank], max(map(len, own)), size)),
            len(rows),
            sum(row.tokens for row in rows),
            sum(row.extra_tokens for row in rows),
        )


def passes(rows: Sequence[int], most: int, size: int | None = None) -> list[Pass]:
    """Cut positions into as many passes as the process with `most` rows needs.

    Args:
        rows: this process's positions; may be empty where position 0 exists.
        most: rows of the process that has most; >= 1.
        size: rows in a pass; None takes all at once.
    """
    size = size or most
    cut = [Pass(tuple(rows[start : start + size])) for start in range(0, len(rows), size)]
    idle = Pass((rows[0] if rows else 0,), counts=False)
    return cut + [idle] * (math.ceil(most / size) - len(cut))
