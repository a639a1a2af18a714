"""A scored rollout turned into what the policy learns from, and into what is logged of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.functional.policy_gradient import gae, kl_estimates
from lit_rlhf.functional.sequence import masked_mean
from lit_rlhf.modules.experience import Experience
from lit_rlhf.modules.on_policy import KL
from lit_rlhf.modules.ppo_streams import reward_streams, score_columns, standardised_streams, stream_columns
from lit_rlhf.modules.reduce import means
from lit_rlhf.types import Rollout, Scores

if TYPE_CHECKING:
    from lit_rlhf.modules.ppo import PPOModule


def make_experience(
    module: PPOModule, index: Tensor, rollout: Rollout, scores: Mapping[str, Scores]
) -> tuple[Experience, dict[str, float]]:
    """Turn scores into advantages of every stream, standardised over all processes.

    Args:
        module: with policy, critic, multipliers and options.
        index: [B], row numbers in the data set.
        rollout: B responses.
        scores: name of the reward to [B], in its scorer's raw units.

    Returns:
        What to learn from, and means over all processes to log.
    """
    mask, bound = rollout.response_mask, module.clip_scores
    reference, values = module.judged(rollout)
    units = {name: module.scale.to_units(name, found.total) for name, found in scores.items()}
    clipped = {name: x if bound is None else x.clamp(-bound, bound) for name, x in units.items()}
    rewards = reward_streams(module, clipped, rollout, reference)
    raw, targets = gae(rewards, values, mask, module.ppo.gamma, module.ppo.gae_lambda)
    kl = kl_estimates(rollout.token_logps, reference, mask)
    worth = [kl["k1"].float() if name == KL else units[name].float() for name in module.multipliers.constraints]
    experience = Experience(
        index=index.to(module.device),
        sequences=rollout.sequences,
        behaviour_logps=rollout.token_logps,
        values=values,
        advantages=standardised_streams(module.ppo, raw, rewards, mask) if module.mixes_standardised else raw,
        targets=targets,
        constraint_values=torch.stack(worth, -1) if worth else kl["k1"].new_zeros(len(mask), 0),
    )
    columns = rollout_columns(rollout, kl) | score_columns(scores, units, clipped)
    columns |= {
        "objective/scores": module.objective.combine(clipped),
        "objective/rlhf_reward": rewards[..., 0].sum(-1),
        "objective/kl_penalty": float(module.progress.kl_coefficient) * kl["k1"],
    }
    columns |= stream_columns(["task", *module.multipliers.constraints], rewards, raw, values, mask)
    return experience, means(columns)


def rollout_columns(rollout: Rollout, kl: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is logged of the samples themselves; `kl` of `kl_estimates`, [B] each."""
    mask, logps = rollout.response_mask, rollout.token_logps
    return {
        "objective/kl": kl["k1"],
        "objective/kl_k3": kl["k3"],
        "objective/entropy": -logps.sum(-1),
        "objective/length": mask.sum(-1),
        "objective/ended": rollout.ended,
        "policy/sampler_mismatch": masked_mean((rollout.sampler_logps - logps).abs(), mask),
    }
