"""The losses of one pass of PPO, and their sums over passes, processes and steps."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.functional.policy_gradient import clipped_surrogate, clipped_value
from lit_rlhf.functional.sequence import masked_sum
from lit_rlhf.modules.experience import Experience
from lit_rlhf.modules.minibatches import Minibatch
from lit_rlhf.types import Sequences, UserError

if TYPE_CHECKING:
    from lit_rlhf.modules.ppo import PPOModule

TAGS = (
    "loss", "loss/policy", "loss/value", "loss/ptx", "val/ratio", "policy/clipfrac", "policy/approxkl",
    "policy/entropy", "value/clipfrac", "value/error",
)  # fmt: skip


def micro_losses(
    module: PPOModule,
    experience: Experience,
    advantages: Tensor,
    demonstrations: Sequences | None,
    minibatch: Minibatch,
) -> tuple[Tensor, Tensor]:
    """Return this pass's part of the minibatch's loss.

    loss = surrogate + value_coefficient x sum over streams of values - entropy_coefficient x entropy
           + ptx_coefficient x ptx,    the first three a response token, the last a token of the demonstrations

    Args:
        module: with policy, critic and options.
        experience: rows of the pass.
        advantages: [b, T] or wider, mixed.
        demonstrations: as many rows, or None.
        minibatch: gives the token counts of all processes.

    Returns:
        The loss, [], divided by the whole minibatch's tokens; and sums to log, in the order of `TAGS`, with those that
        are means over tokens not yet divided.
    """
    options, mask = module.ppo, experience.mask
    width = mask.shape[1]
    all_logps, all_values, all_entropy = module.policy_and_values(experience.sequences)
    logps, values = all_logps[:, -width:], all_values[:, -width:]
    surrogate = clipped_surrogate(logps, experience.behaviour_logps, advantages[:, :width], mask, options.clip_range)
    critic = clipped_value(values, experience.values, experience.targets, mask, options.value_clip_range)
    policy, value = surrogate.loss.sum(), critic.loss.sum()
    entropy = policy.new_zeros(()) if all_entropy is None else masked_sum(all_entropy[:, -width:], mask).sum()
    tokens = policy + options.value_coefficient * value - options.entropy_coefficient * entropy
    loss, ptx = tokens / minibatch.tokens, policy.new_zeros(())
    if demonstrations is not None:
        ptx = -module.logps(demonstrations).sum() / max(minibatch.extra_tokens, 1)
        loss = loss + options.ptx_coefficient * ptx
    sums = [
        loss * minibatch.tokens, policy, value, ptx * minibatch.tokens, surrogate.metrics["ratio"].sum(),
        surrogate.metrics["clipped"].sum(), surrogate.metrics["approx_kl"].sum(), entropy,
        critic.metrics["clipped"].sum() / values.shape[-1], critic.metrics["squared_error"].sum(),
    ]  # fmt: skip
    return loss, torch.stack([x.detach().double() for x in sums])


class Totals:
    """Adds up what the steps of one update have seen, over all processes.

    Args:
        unmeasured: tags that this run does not compute, and so does not log.
    """

    def __init__(self, unmeasured: Collection[str] = ()) -> None:
        self.unmeasured = unmeasured
        self.sums = torch.zeros(len(TAGS), dtype=torch.float64)
        self.tokens = 0
        self.steps = 0
        self.stopped = False
        self._norms: list[tuple[float, ...]] = []

    def add(self, sums: Tensor, minibatch: Minibatch, stop_at_kl: float | None, update: int) -> bool:
        """Take in a minibatch's sums over all processes, and say whether the policy may step on it.

        Raises:
            UserError: a sum is not finite; nothing was updated with it.
        """
        means = dict(zip(TAGS, (sums / minibatch.tokens).tolist(), strict=True))
        if not all(math.isfinite(value) for value in means.values()):
            bad = ", ".join(f"{name} = {value}" for name, value in means.items() if not math.isfinite(value))
            raise UserError(
                f"update {update}: not finite: {bad}. Nothing was updated with it; lower optimizer.lr, raise"
                " warmup_ratio or use a wider dtype"
            )
        self.sums += sums.cpu()
        self.tokens += minibatch.tokens
        self.stopped = stop_at_kl is not None and means["policy/approxkl"] > stop_at_kl
        self.steps += not self.stopped
        return not self.stopped

    def norm(self, norms: tuple[float, ...]) -> None:
        """Take in the gradient norms of policy and critic before clipping."""
        self._norms.append(norms)

    def metrics(self) -> dict[str, float]:
        """Return means over tokens by tag, the steps taken, and mean gradient norms."""
        found = dict(zip(TAGS, (self.sums / max(self.tokens, 1)).tolist(), strict=True))
        for name, norms in zip(("policy", "value"), zip(*self._norms, strict=True), strict=False):
            found[f"{name}/grad_norm"] = sum(norms) / len(norms)
        found = {name: value for name, value in found.items() if name not in self.unmeasured}
        return found | {"policy/steps": float(self.steps), "policy/stopped": float(self.stopped)}


def clip_gradients(optimizer: Any, max_norm: float | None) -> tuple[float, ...]:
    """Scale each parameter group's gradients down to a norm; return the norms before.

    Groups apart, since the critic's first errors would otherwise leave the policy no step.
    """
    norms = []
    for group in optimizer.param_groups:
        norm: Any = torch.nn.utils.clip_grad_norm_(group["params"], math.inf if max_norm is None else max_norm)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
    return tuple(norms)
