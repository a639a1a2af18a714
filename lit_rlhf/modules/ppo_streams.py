"""The rewards of PPO's streams, the task's first, their advantages on one scale, and what is logged of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.functional.disagreement import lowest
from lit_rlhf.functional.policy_gradient import gae
from lit_rlhf.functional.sequence import standardise
from lit_rlhf.functional.shaping import kl_rewards, penalise_unended, terminal_rewards
from lit_rlhf.modules.on_policy import KL
from lit_rlhf.modules.ppo_options import PPOOptions
from lit_rlhf.modules.reduce import moments
from lit_rlhf.types import Rollout, Scores

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


def score_columns(
    scores: Mapping[str, Scores], units: Mapping[str, Tensor], clipped: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is logged of each reward, [B] a tag: as scored, in units, clipped; and how its members differ."""
    columns: dict[str, Tensor] = {}
    for name, found in scores.items():
        own = {"raw": found.total, "normalised": units[name], "clipped": clipped[name]}
        if found.members is not None:
            own["members_std"] = found.members.std(-1, correction=0)
            own |= {f"min_member/{k}": share for k, share in enumerate(lowest(found.members).T)}
        columns |= {f"objective/scores/{name}/{kind}": column for kind, column in own.items()}
    return columns


def stream_columns(
    names: Sequence[str], rewards: Tensor, advantages: Tensor, values: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Return the sizes of each stream before anything is standardised, so that one that drowns the others is seen.

    Args:
        names: of the S streams.
        rewards: [B, T, S].
        advantages: [B, T, S].
        values: [B, T, S], of the critic.
        mask: [B, T].
    """
    columns = {}
    for number, name in enumerate(names):
        columns[f"stream/{name}/reward"] = rewards[..., number].sum(-1).abs()
        columns[f"stream/{name}/advantage"] = advantages[..., number][mask].abs()
        columns[f"stream/{name}/value"] = values[..., number][mask].abs()
    return columns
