"""What can be set of PPO, as blocks of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_rlhf.models.backbone import LoRA
from lit_rlhf.types import UserError


@dataclass(frozen=True)
class PPOOptions:
    """The update of proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347).

    Args:
        epochs: passes over each rollout; >= 1.
        minibatches: optimizer steps a pass; >= 1, at most the rows of a rollout.
        micro_batch_size: rows in one forward and backward pass; None runs a process's share of a minibatch at once.
        rollout_batch_size: rows sampled at once; None samples all.
        gamma: discount a token, in [0, 1].
        gae_lambda: in [0, 1]; 1 takes whole returns, 0 one step.
        clip_range: bound of the probability ratio around 1; > 0.
        value_clip_range: bound of the critic's move in the stream's units, > 0; None does not clip.
        value_coefficient: weight of the critic's loss, >= 0; streams add up.
        entropy_coefficient: reward for entropy, nats a token; >= 0. At 0 the exact entropy is not computed.
        max_grad_norm: gradients are scaled down to this norm, policy and critic apart; None does not.
        stop_at_kl: end the update when a minibatch has moved this far from the behaviour policy, nats a token; None
            does not look.
        standardise: scale advantages to mean 0 and variance 1 over all tokens of the update, each stream alone; with
            `dual.form` reward_minus_cost, their mix.
        floor: streams whose returns spread less than this, in their units, are only centred.
        unended_penalty: taken off the task's score of responses that ran into the limit; >= 0, in the run's units.
        ptx_coefficient: weight of the demonstrations' loss (nats a token), where the data bring any; >= 0.
        scale_samples: responses of the reference policy on which the rewards' units are measured, one to each of the
            first training prompts; >= 2.
    """

    epochs: int = 2
    minibatches: int = 4
    micro_batch_size: int | None = None
    rollout_batch_size: int | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    max_grad_norm: float | None = 1.0
    stop_at_kl: float | None = None
    standardise: bool = True
    floor: float = 1e-4
    unended_penalty: float = 0.0
    ptx_coefficient: float = 0.0
    scale_samples: int = 256

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        for name in ("epochs", "minibatches", "micro_batch_size", "rollout_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"ppo.{name} must be >= 1, got {value}")
        if self.scale_samples < 2:
            raise UserError(f"ppo.scale_samples must be >= 2, got {self.scale_samples}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"ppo.{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("clip_range", "value_clip_range", "max_grad_norm", "stop_at_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"ppo.{name} must be > 0, got {value}")
        for name in ("value_coefficient", "entropy_coefficient", "floor", "unended_penalty", "ptx_coefficient"):
            if not getattr(self, name) >= 0:
                raise UserError(f"ppo.{name} must be >= 0, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """Optimizer steps an update, unless it stops early or the rollout has fewer rows than minibatches."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class CriticOptions:
    """Who estimates the values.

    Args:
        form: "heads" on the policy's own states (cheapest), "lora": adapters of its own on the policy's frozen base, or
            "model": a model of its own.
        path: of that model, a causal LM or a reward model; None takes the policy's.
        lora: its adapters; None takes the policy's settings for "lora", and trains all weights of a "model".
        lr: peak learning rate; None takes the policy's.
    """

    form: Literal["heads", "lora", "model"] = "heads"
    path: str | None = None
    lora: LoRA | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"critic.lr must be > 0, got {self.lr}")
        if self.path is not None and self.form != "model":
            raise UserError(f"critic.path is read by form model alone, got form {self.form!r} and path {self.path!r}")
