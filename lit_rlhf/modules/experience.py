"""What one rollout leaves behind to learn from.

Legend: B sampled responses on this process, L columns of a row, T response columns, S reward streams (the task first,
then one for each constraint).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rlhf.types import Movable, Rollout, Sequences


@dataclass(frozen=True)
class Experience(Movable):
    """B responses with what the update needs of the policy that drew them.

    Args:
        index: [B], row numbers in the data set.
        sequences: B rows of L columns, the last T of them the responses'.
        behaviour_logps: [B, T], nats, of the policy that drew them, by a fresh pass.
        values: [B, T, S], the critic's then.
        advantages: [B, T, S], of each stream apart.
        targets: [B, T, S], what the critic learns.
        constraint_values: [B, S - 1], what each response is worth to each constraint, in the run's units, unclipped.
    """

    index: Tensor
    sequences: Sequences
    behaviour_logps: Tensor
    values: Tensor
    advantages: Tensor
    targets: Tensor
    constraint_values: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, T], True on response tokens."""
        return self.sequences.response_mask[:, -self.behaviour_logps.shape[1] :]

    def rows(self, positions: Sequence[int]) -> Self:
        """Return some rows, without the columns that are padding in all of them."""
        chosen = torch.tensor(list(positions), device=self.index.device)
        sequences, cut = trimmed(self.sequences, chosen)
        width = self.behaviour_logps.shape[1] - cut
        columns = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name != "sequences"}
        whole = ("index", "constraint_values")
        kept = {name: x if name in whole else x[:, :width] for name, x in columns.items()}
        return type(self)(sequences=sequences, **kept)


def trimmed(sequences: Sequences, rows: Tensor) -> tuple[Sequences, int]:
    """Take some rows and drop the columns on either side that are padding in all of them.

    Args:
        sequences: N rows.
        rows: [B], positions.

    Returns:
        B rows, and how many columns went on the right.
    """
    used = sequences.attention_mask[rows].any(0).nonzero()[:, 0]
    first, last = int(used[0]), int(used[-1]) + 1
    parts = (sequences.ids, sequences.attention_mask, sequences.response_mask)
    return Sequences(*(part[rows, first:last] for part in parts)), sequences.ids.shape[1] - last


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """Put rollouts of different widths under one another: prompts stay padded on the left, responses on the right."""
    if len(rollouts) == 1:
        return rollouts[0]
    response = [r.token_logps.shape[1] for r in rollouts]
    prompt = [r.sequences.ids.shape[1] - width for r, width in zip(rollouts, response, strict=True)]
    left, right = ([max(widths) - width for width in widths] for widths in (prompt, response))

    def rows(tensors: Sequence[Tensor], *, whole: bool) -> Tensor:
        sides = [(left[k] if whole else 0, right[k]) for k in range(len(rollouts))]
        return torch.cat([pad(x, side) for x, side in zip(tensors, sides, strict=True)])

    def field(name: str) -> Tensor:
        return rows([getattr(r.sequences, name) for r in rollouts], whole=True)

    categories = [c for r in rollouts for c in r.categories or [None] * len(r.prompts)]
    return Rollout(
        prompts=[p for r in rollouts for p in r.prompts],
        responses=[text for r in rollouts for text in r.responses],
        sequences=Sequences(field("ids"), field("attention_mask"), field("response_mask")),
        token_logps=rows([r.token_logps for r in rollouts], whole=False),
        sampler_logps=rows([r.sampler_logps for r in rollouts], whole=False),
        ended=torch.cat([r.ended for r in rollouts]),
        sampling=rollouts[0].sampling,
        categories=categories if any(r.categories for r in rollouts) else None,
    )
