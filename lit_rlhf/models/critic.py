"""The critic: what a state will be worth, one value head a reward stream."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rlhf.models.backbone import Backbone, placed
from lit_rlhf.models.loading import (
    ModelOptions,
    checkpoint_activations,
    decoder_layers,
    inject_lora,
    run_transformer,
)
from lit_rlhf.models.reward import load_classifier
from lit_rlhf.types import Sequences, UserError

CRITIC = "critic"  # the name of its adapter on the policy's base


class Critic(nn.Module):
    """S values of the state before each response token, v_s = w_s . h + b_s.

    h is the last hidden state at the position that predicts the token, so a value never sees the token it is the
    baseline of. Heads start at zero, so that the first advantages are the rewards' own, and work in float32.

    Args:
        policy: whose states or frozen base are used by the forms "heads" and "lora".
        path: of the model of form "model": a causal LM, a reward model (its score head is left out), or adapters.
        options: how to load it; `lora` describes the adapters of "lora" and "model".
        streams: S.
        form: "heads" on the policy's own states, with their gradient; "lora": an adapter of its own on the policy's
            frozen base; "model": a body of its own.

    Raises:
        UserError: "lora" without adapters on the policy, or without `options.lora`.
    """

    def __init__(
        self,
        policy: Backbone,
        *,
        path: str,
        options: ModelOptions,
        streams: int,
        form: Literal["model", "lora", "heads"],
    ) -> None:
        super().__init__()
        self.form = form
        self._policy = [policy]  # in a list: its weights are no part of this module
        self.body = Body(path, options) if form == "model" else None
        if form == "lora":
            if options.lora is None:
                raise UserError("critic.form lora needs critic.lora, or model.lora to take over")
            policy.add_adapter(CRITIC, options.lora, trainable=True)
        width = policy.causal_lm.get_output_embeddings().weight.shape[1] if self.body is None else self.body.width
        self.heads = nn.Linear(width, streams, dtype=torch.float32)
        # zero values at first: those of new weights would be noise, which standardising makes as loud as any signal
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, sequences: Sequences) -> Tensor:
        """Return values [N, L, S], float32, each at the column of the token that follows its state; 0 elsewhere."""
        if self.body is not None:
            return placed(self._read(self.body(sequences)), sequences)
        policy = self._policy[0]
        if self.form == "heads":
            return placed(self._read(policy.states(sequences)), sequences)
        with policy.adapter(CRITIC):
            return placed(self._read(policy.states(sequences)), sequences)

    def policy_and_values(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the policy's log-probabilities [N, L] and the values, of one pass where both read the same states."""
        if self.form != "heads":
            return self._policy[0](sequences, temperature), self(sequences)
        logps, states = self._policy[0].logps_and_states(sequences, temperature)
        return logps, placed(self._read(states), sequences)

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard what is the critic's own over a device mesh by FSDP2; the heads stay in float32."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.heads, mesh=mesh)
        if self.body is not None:
            self.body.shard(mesh, mp_policy)

    def _read(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return self.heads(states.float())


class Body(nn.Module):
    """A transformer without a head, trained as a whole or by adapters.

    Args:
        path: causal LM, reward model or adapter folder, or hub id.
        options: how to load it.
    """

    def __init__(self, path: str, options: ModelOptions) -> None:
        super().__init__()
        from lit_rlhf.assets import resolve

        classifier, _ = load_classifier(resolve(path), options, fresh_head=True)
        if options.activation_checkpointing:
            checkpoint_activations(classifier)
        self.width: int = classifier.score.in_features
        self.transformer: Any = classifier.base_model
        if options.lora is not None:
            inject_lora(self.transformer, options.lora)

    def forward(self, sequences: Sequences) -> Tensor:
        """Return the last hidden states at the positions that predict response tokens, [M, H], row after row."""
        hidden = run_transformer(self.transformer, sequences.ids, sequences.attention_mask, sequences.position_ids)
        return hidden[:, :-1][sequences.response_mask[:, 1:]]

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard the parameters over a device mesh by FSDP2: each decoder layer, then the rest."""
        from torch.distributed.fsdp import fully_shard

        how = {"mesh": mesh} | ({"mp_policy": mp_policy} if mp_policy is not None else {})
        layers = self.transformer.config.get_text_config().num_hidden_layers
        for layer in decoder_layers(self.transformer, layers):
            fully_shard(layer, **how)
        fully_shard(self, **how)
