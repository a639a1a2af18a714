"""Held-out pairs as a DMoERM scores them in use: routed, on one scale for all categories.

Legend: B pairs as 2B rows, C categories, K points, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lit_rlhf.models.backbone import evaluating
from lit_rlhf.models.moe import Inner, MoE, select
from lit_rlhf.models.moe_scorer import gated_logit
from lit_rlhf.types import ExpertBatch, Scores

Anywhere = Callable[[bool], bool]


@dataclass(frozen=True)
class Gated:
    """Raw scores of 2B rows by each category that the gate asks for.

    Args:
        raw: [2B, C], 0 where the gate is.
        gate: [2B, C], weight of each category; rows sum to one.
    """

    raw: Tensor
    gate: Tensor

    def scores(self, moe: MoE, inner: Inner) -> Scores:
        """Return the rows' scores on one scale, their parts the gate, where there is more than one category."""
        category = torch.arange(self.gate.shape[1], device=self.gate.device)
        total = (moe.standardised(self.raw, category, inner) * self.gate).sum(1)
        gates = {f"gate/{name}": self.gate[:, c] for c, name in enumerate(moe.categories)}
        return Scores(total, parts=gates if len(gates) > 1 else {})

    def logits(self) -> Tensor:
        """Return the logits, [B], of the probability that `chosen` is the better one."""
        chosen, rejected = self.raw.chunk(2)
        return gated_logit(chosen - rejected, self.gate.chunk(2)[0])


def own_gate(category: Tensor, count: int) -> Tensor:
    """Return the gate [B, C] that asks each pair's own category alone."""
    return one_hot(category, count).float()


@torch.no_grad()
def gated(moe: MoE, batch: ExpertBatch, raw: Tensor, gate: Tensor, inner: Inner, anywhere: Anywhere) -> Gated:
    """Add to the scores by the rows' own categories those of the others that the gate asks for.

    Args:
        moe: the model.
        batch: B pairs.
        raw: [2B], by the rows' own categories.
        gate: [B, C].
        inner: which score.
        anywhere: says whether any process has something to compute.
    """
    gate, own = gate.repeat(2, 1), batch.category.repeat(2)
    rows, category = gate.nonzero(as_tuple=True)
    found = raw.detach()[rows]
    other = (category != own[rows]).nonzero()[:, 0]
    if anywhere(len(other) > 0):
        other = other if len(other) else other.new_zeros(1)  # for the other processes' sake; the score stays
        found[other] = moe.score(select(batch.sequences, rows[other]), category[other], inner)[0]
    return Gated(torch.zeros_like(gate).index_put((rows, category), found.to(gate.dtype)), gate)


def mixed_states(moe: MoE, batch: ExpertBatch, kept: dict[int, Tensor], anywhere: Anywhere) -> Tensor:
    """Return the states of all points of the batch's rows, [2B, K, H], by frozen experts: once a pair, no dropout.

    Args:
        moe: the model.
        batch: B pairs.
        kept: pair to its states [2, K, H], on the CPU; what is missing is added.
        anywhere: says whether any process has something to compute.
    """
    numbers, category = batch.index.tolist(), batch.category.repeat(2)
    if anywhere(any(number not in kept for number in numbers)):
        with torch.no_grad(), evaluating(moe):
            found = moe.states(batch.sequences, category)
        kept.update(zip(numbers, torch.stack(found.chunk(2), 1).cpu(), strict=True))
    return torch.stack([kept[number] for number in numbers], 1).flatten(0, 1).to(category.device)
