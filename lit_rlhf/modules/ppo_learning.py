"""The optimizer's steps on one rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.modules.experience import Experience, trimmed
from lit_rlhf.modules.minibatches import Minibatch, RowTable
from lit_rlhf.modules.ppo_update import Totals, clip_gradients, micro_losses
from lit_rlhf.modules.reduce import summed, world_size
from lit_rlhf.types import SequenceBatch, Sequences, Share

if TYPE_CHECKING:
    from lit_rlhf.modules.ppo import PPOModule


def learn(
    module: PPOModule, experience: Experience, optimizer: Any, demonstrations: SequenceBatch | None
) -> dict[str, float]:
    """Step through all epochs and minibatches, or until `stop_at_kl` ends the update.

    Args:
        module: with policy, critic, multipliers and options.
        experience: the rollout.
        optimizer: over policy and critic.
        demonstrations: as many rows as the experience has, or None.

    Returns:
        Means over all tokens of all steps and processes, to log.

    Raises:
        UserError: a loss is not finite.
    """
    unmeasured = [] if module.ppo.entropy_coefficient else ["policy/entropy"]
    totals = Totals(unmeasured if demonstrations is not None else [*unmeasured, "loss/ptx"])
    rows = None if demonstrations is None else demonstrations.sequences
    advantages = module.mixed(experience)
    for minibatch in _minibatches(module, experience, rows):
        optimizer.zero_grad()
        sums = _backward(module, experience, advantages, rows, minibatch)
        if not totals.add(summed(sums), minibatch, module.ppo.stop_at_kl, module.updates):
            break
        totals.norm(clip_gradients(optimizer, module.ppo.max_grad_norm))
        optimizer.step()
        if module.dual.every == "minibatch":
            own = [row for part in minibatch.passes if part.counts for row in part.rows]
            module.multipliers.update(module.constraint_values(experience, own))
            advantages = module.mixed(experience)
    optimizer.zero_grad()
    return totals.metrics()


def _minibatches(module: PPOModule, experience: Experience, demonstrations: Sequences | None) -> Iterator[Minibatch]:
    """Yield the minibatches of all epochs, each epoch in an order of its own, the same on all processes."""
    extra = None if demonstrations is None else demonstrations.response_lengths
    table = RowTable.gather(experience.index, experience.mask.sum(-1), extra)
    module.share = Share(*(torch.tensor(x / world_size()) for x in (len(table.rows), table.tokens)))
    for epoch in range(module.ppo.epochs):
        order = (module.run_seed, module.updates, epoch)
        yield from table.minibatches(order, module.ppo.minibatches, module.ppo.micro_batch_size)


def _backward(
    module: PPOModule,
    experience: Experience,
    advantages: Tensor,
    demonstrations: Sequences | None,
    minibatch: Minibatch,
) -> Tensor:
    """Add up the gradients of a minibatch over its passes; return this process's sums to log."""
    total: Tensor | None = None
    for part in minibatch.passes:
        demo = None if demonstrations is None else _rows_of(demonstrations, part.rows)
        loss, found = micro_losses(module, experience.rows(part.rows), advantages[list(part.rows)], demo, minibatch)
        module.backward_pass(loss * (world_size() * part.counts))
        total = found * part.counts if total is None else total + found * part.counts
    assert total is not None, "every process has a pass"
    return total


def _rows_of(sequences: Sequences, rows: Sequence[int]) -> Sequences:
    return trimmed(sequences, torch.tensor(list(rows), device=sequences.ids.device))[0]
