"""The rewards of PPO's streams, the task's first, and their advantages on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.functional.policy_gradient import gae
from lit_rlhf.functional.sequence import standardise
from lit_rlhf.functional.shaping import kl_rewards, penalise_unended, terminal_rewards
from lit_rlhf.modules.on_policy import KL
from lit_rlhf.modules.ppo_options import PPOOptions
from lit_rlhf.modules.reduce import moments
from lit_rlhf.types import Rollout

if TYPE_CHECKING:
    from lit_rlhf.modules.ppo import PPOModule


def reward_streams(module: PPOModule, scores: Mapping[str, Tensor], rollout: Rollout, reference: Tensor) -> Tensor:
    """Return the rewards of all streams, [B, T, S]; where costs are subtracted they are charged the KL too."""
    mask, logps = rollout.response_mask, rollout.token_logps
    penalty = kl_rewards(logps, reference, mask, float(module.progress.kl_coefficient))
    task = penalise_unended(module.objective.combine(scores), rollout.ended, module.ppo.unended_penalty)
    streams = [terminal_rewards(task, mask) + penalty]
    for name in module.multipliers.constraints:
        own = -kl_rewards(logps, reference, mask, 1.0) if name == KL else terminal_rewards(scores[name], mask)
        streams.append(own - penalty if module.dual.form == "reward_minus_cost" else own)
    return torch.stack(streams, -1)


def standardised_streams(options: PPOOptions, advantages: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Standardise each stream over all processes; one whose returns do not differ is only centred.

    Such a stream's advantages are the critic's noise, which unit variance would make as loud as a signal.

    Args:
        options: with `gamma` and `floor`.
        advantages: [B, T, S].
        rewards: [B, T, S], of which they were made.
        mask: [B, T].
    """
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, options.gamma, 1.0)
    count, total, squares = moments(returns, mask)
    spread = (squares / count - (total / count).square()).clamp_min(0).sqrt()
    own = moments(advantages, mask)
    scaled = standardise(advantages, mask, center=True, moments=own, floor=0.0)
    centred = standardise(advantages, mask, center=True, moments=own, floor=float("inf"))
    return torch.where(spread > options.floor, scaled, centred)
