"""A policy that samples for itself, with a critic beside it: what both say of rollouts, and what of them is trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.models.critic import CRITIC, Critic
from lit_rlhf.modules.experience import trimmed
from lit_rlhf.modules.minibatches import passes
from lit_rlhf.modules.on_policy import OnPolicyModule
from lit_rlhf.modules.ppo_options import CriticOptions
from lit_rlhf.types import Rollout, Sequences


class ActorCriticModule(OnPolicyModule):
    """Policy, reference and critic; children say how many streams of rewards are valued.

    Args:
        critic: who estimates the values.
        micro_batch_size: rows of one pass over a rollout; None takes all.
        with_entropy: whether exact entropies are wanted.
        on_policy: arguments of `OnPolicyModule`.
    """

    def __init__(
        self,
        *,
        critic: CriticOptions,
        micro_batch_size: int | None = None,
        with_entropy: bool = False,
        **on_policy: Any,
    ) -> None:
        super().__init__(**on_policy)
        self.critic_options, self.micro_batch_size, self.with_entropy = critic, micro_batch_size, with_entropy
        self.critic: Critic | None = None

    @property
    @abstractmethod
    def streams(self) -> int:
        """Number of reward streams, S, each with a value head."""

    def build_models(self) -> None:
        """Load policy, reference and critic."""
        super().build_models()
        assert self.policy is not None
        wanted = self.critic_options
        lora = wanted.lora or (self.options.lora if wanted.form == "lora" else None)
        self.critic = Critic(
            self.policy,
            path=wanted.path or self.model_name_or_path,
            options=replace(self.options, lora=lora),
            streams=self.streams,
            form=wanted.form,
        )

    def backbones(self) -> list[Any]:
        """Return the loaded models."""
        return [*super().backbones(), *([] if self.critic is None else [self.critic])]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters of the policy, and those that are the critic's alone with their rate."""
        assert self.policy is not None
        own = [p for name, p in self.policy.named_parameters() if p.requires_grad and f".{CRITIC}." not in name]
        known = {id(p) for p in own}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        rate = {} if self.critic_options.lr is None else {"lr": self.critic_options.lr}
        return [{"params": own}, {"params": others} | rate]

    def policy_and_values(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log-probabilities [N, L], values [N, L, S], and entropies [N, L] where they are rewarded."""
        assert self.policy is not None
        assert self.critic is not None
        temperature = self.sampling.temperature
        if self.with_entropy:
            logps, entropy = self.policy.logps_and_entropy(sequences, temperature)
            return logps, self.critic(sequences), entropy
        if self.critic_options.form == "heads":  # both from one pass over the body
            return *self.critic.policy_and_values(sequences, temperature), None
        return self.logps(sequences, temperature), self.critic(sequences), None

    def judged(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the reference's log-probabilities, [B, T], and the critic's values, [B, T, S]."""
        assert self.critic is not None
        empty = rollout.token_logps.new_zeros(*rollout.token_logps.shape, self.streams)
        return self.judged_reference(rollout), self._read(rollout, self.critic, empty)

    def judged_reference(self, rollout: Rollout) -> Tensor:
        """Return the reference's log-probabilities alone."""

        def logps(sequences: Sequences) -> Tensor:
            return self.reference_token_logps(sequences, self.sampling.temperature)

        return self._read(rollout, logps, torch.zeros_like(rollout.token_logps))

    def _read(self, rollout: Rollout, read: Callable[[Sequences], Tensor], table: Tensor) -> Tensor:
        """Fill a table [B, T, ...] with what is read off the rollout, some rows at a time."""
        count, width = rollout.token_logps.shape
        for part in passes(range(count), self.most(count), self.micro_batch_size):
            rows = torch.tensor(part.rows, device=table.device)
            sequences, cut = trimmed(rollout.sequences, rows)
            with self._inference():
                found = read(sequences)
            table[rows, : width - cut] = found[:, cut - width :].to(table)
        return table

    def backward_pass(self, loss: Tensor) -> None:
        """Add to the gradients, through the Trainer where there is one."""
        if self._trainer is None:
            loss.backward()
        else:
            self.manual_backward(loss)
