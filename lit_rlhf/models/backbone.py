"""A causal language model behind one door: log-probabilities, next-token logits, adapters, shards, export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rlhf.functional.sequence import (
    chunked_logps_and_entropy,
    chunked_token_logps,
    logps_and_entropy,
    token_logps,
)
from lit_rlhf.models.adapters import POLICY, add_adapter, lora_layers, using, without
from lit_rlhf.models.loading import (
    LoRA,
    ModelOptions,
    accepts,
    adapter_base,
    add_lora,
    checkpoint_activations,
    decoder_layers,
    evaluating,
    full_state_dict,
    is_writer,
    load_config,
    load_model,
    merge_adapter,
    run_transformer,
)
from lit_rlhf.types import Sequences, UserError

__all__ = ["Backbone", "LoRA", "ModelOptions", "evaluating"]


class Backbone(nn.Module):
    """A causal LM, plain or with LoRA, whose forward pass gives token log-probabilities.

    logp_t = log softmax(logits_{t-1} / temperature)[ids_t]

    The head runs on the positions that predict response tokens only, and in chunks, so that no [N, L, V] tensor is
    held. Models that scale, cap or shift their logits after the head are found at load; they use their own logits on
    the same positions, which is exact and takes more memory (`head_path` says which).

    Args:
        path: model folder, LoRA adapter folder, or hub id.
        options: dtype, attention, checkpointing, LoRA.

    Attributes:
        model: the transformers model, or peft's wrapper of it.
        head_path: "chunked" or "full".
        sharded: whether `shard` was called.

    Raises:
        UserError: no such model, missing weights, or LoRA on the output head.
    """

    def __init__(self, path: str, options: ModelOptions | None = None) -> None:
        super().__init__()
        from lit_rlhf.assets import resolve

        self.path = resolve(path)
        self.options = options or ModelOptions()
        model = _load_causal_lm(self.path, self.options)
        self.head_path: Literal["chunked", "full"] = "chunked" if _head_is_plain(model) else "full"
        self.model: Any = add_lora(model, self.options.lora, "CAUSAL_LM") if self.options.lora else model
        if self.options.activation_checkpointing:
            checkpoint_activations(self.causal_lm)
        self.sharded = False

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside, its layers carrying the adapters where there are any."""
        return self.model.get_base_model() if self.options.lora else self.model

    @property
    def context_window(self) -> int | None:
        """Tokens that the positions reach; None where the config gives no limit."""
        limit = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def forward(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities of the response tokens.

        Args:
            sequences: N rows of L columns, padded on either side.
            temperature: divides the logits.

        Returns:
            [N, L], nats, float32, each at its token's own column; 0 outside `response_mask`.
        """
        wanted = sequences.response_mask[:, 1:]
        labels = sequences.ids[:, 1:][wanted]
        if self.head_path == "full":
            return placed(token_logps(self._logits(sequences) / temperature, labels), sequences)
        return placed(self._chunked(self.states(sequences), labels, temperature), sequences)

    def states(self, sequences: Sequences) -> Tensor:
        """Return the last hidden states at the positions that predict response tokens, [M, H], row after row."""
        hidden = run_transformer(
            self.causal_lm.base_model, sequences.ids, sequences.attention_mask, sequences.position_ids
        )
        return hidden[:, :-1][sequences.response_mask[:, 1:]]

    def logps_and_states(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return `forward` and `states` of one pass; of two where the model makes its own logits."""
        if self.head_path == "full":
            return self.forward(sequences, temperature), self.states(sequences)
        states = self.states(sequences)
        labels = sequences.ids[:, 1:][sequences.response_mask[:, 1:]]
        return placed(self._chunked(states, labels, temperature), sequences), states

    def logps_and_entropy(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return `forward` and the entropies of the same distributions, [N, L], nats; both have gradients."""
        labels = sequences.ids[:, 1:][sequences.response_mask[:, 1:]]
        if self.head_path == "full":
            logps, entropy = logps_and_entropy(self._logits(sequences) / temperature, labels)
        else:
            states = self.states(sequences)
            weight = self.causal_lm.get_output_embeddings().weight
            logps, entropy = chunked_logps_and_entropy(_tempered(states, temperature), weight, labels)
        return placed(logps, sequences), placed(entropy, sequences)

    def next_logits(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Return the logits after the last column, and let `cache` take in the columns given.

        Args:
            ids: [N, C], the new columns.
            attention_mask: [N, cached + C], True on real tokens.
            position_ids: [N, C].
            cache: a transformers cache, updated in place.

        Returns:
            [N, V], float32.
        """
        model = self.causal_lm
        extra: dict[str, Any] = {"position_ids": position_ids} if accepts(model, "position_ids") else {}
        extra |= {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        output = model(
            input_ids=ids, attention_mask=attention_mask.long(), past_key_values=cache, use_cache=True, **extra
        )
        return output.logits[:, -1].float()

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Run the model without its LoRA updates: the reference of a LoRA policy.

        Raises:
            UserError: the model has no adapters.
        """
        if not self.options.lora:
            raise UserError("this model has no LoRA adapters to turn off; give the reference a model of its own")
        with without(lora_layers(self.model)):
            yield

    def add_adapter(self, name: str, lora: LoRA, *, trainable: bool) -> None:
        """Put one more adapter beside the policy's, on the same weights.

        Raises:
            UserError: the policy has no adapters, so its base moves, or the name is taken.
        """
        if not self.options.lora:
            raise UserError(f"adapter {name!r} needs a frozen base; expected model.lora to be set for the policy")
        add_adapter(self.model, name, lora, trainable=trainable)

    def adapter(self, name: str) -> AbstractContextManager[None]:
        """Run the model with another of its adapters in place of the policy's."""
        return using(self.model, name)

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard the parameters over a device mesh by FSDP2: each decoder layer, then the rest with this module as root.

        Args:
            mesh: a one-dimensional data-parallel mesh (or two-dimensional for hybrid sharding).
            mp_policy: torch's MixedPrecisionPolicy; None computes in the parameters' own dtype.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        how = {"mesh": mesh} | ({"mp_policy": mp_policy} if mp_policy is not None else {})
        model = self.causal_lm
        for layer in decoder_layers(model.base_model, model.config.get_text_config().num_hidden_layers):
            fully_shard(layer, **how)
        fully_shard(self, **how)
        for name in ("next_logits", "states", "logps_and_states", "logps_and_entropy"):
            register_fsdp_forward_method(self, name)
        self.sharded = True

    def export(self, folder: str | Path, tokenizer: Any, *, merged: bool = False) -> None:
        """Write a folder that plain transformers (or peft, for adapters) loads; call it on all ranks, rank 0 writes.

        Other adapters on the same weights stay out.

        Args:
            folder: where to; made if absent.
            tokenizer: saved beside the weights.
            merged: with LoRA, write the full model with the updates added in, in place of the adapter alone.
        """
        state = full_state_dict(self.model)
        if not is_writer():
            return
        if self.options.lora and merged:
            copy = Backbone(self.path, self.options)
            copy.model.load_state_dict({name: state[name] for name in copy.model.state_dict()})
            copy.model.merge_and_unload().save_pretrained(folder)
        elif self.options.lora:
            own = {"selected_adapters": [POLICY], "save_embedding_layers": False}
            self.model.save_pretrained(folder, state_dict=state, **own)
        else:
            self.model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    def _chunked(self, states: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return chunked_token_logps(
            _tempered(states, temperature), self.causal_lm.get_output_embeddings().weight, labels
        )

    def _logits(self, sequences: Sequences) -> Tensor:
        """Return the model's own logits at the positions that predict response tokens, [M, V], float32."""
        model, wanted = self.causal_lm, sequences.response_mask[:, 1:]
        extra = {"position_ids": sequences.position_ids} if accepts(model, "position_ids") else {}
        columns = wanted.any(0).nonzero()[:, 0]
        extra |= {"logits_to_keep": columns} if accepts(model, "logits_to_keep") else {}
        output = model(
            input_ids=sequences.ids, attention_mask=sequences.attention_mask.long(), use_cache=False, **extra
        )
        logits = output.logits if "logits_to_keep" in extra else output.logits[:, columns]
        return logits[wanted[:, columns]].float()


def placed(values: Tensor, sequences: Sequences) -> Tensor:
    """Put values of response tokens, [M] or [M, S], at the tokens' own columns: [N, L] or [N, L, S], 0 elsewhere."""
    rows, columns = sequences.response_mask[:, 1:].nonzero(as_tuple=True)
    out = values.new_zeros(*sequences.ids.shape, *values.shape[1:])
    return out.index_put((rows, columns + 1), values)


def _tempered(states: Tensor, temperature: float) -> Tensor:
    return states if temperature == 1 else states / temperature


def _load_causal_lm(path: str, options: ModelOptions) -> Any:
    from transformers import AutoModelForCausalLM

    base = adapter_base(path)
    model = load_model(AutoModelForCausalLM, base or path, options, load_config(base or path, options))
    return model if base is None else merge_adapter(model, path)


@torch.no_grad()
def _head_is_plain(model: Any) -> bool:
    """Say whether logits are nothing but hidden states times the head's weight.

    The model's own head is asked about hidden states of our choice, large enough that a cap, a scale or a shift shows.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return False
    # Lightning changes the default device and dtype while models are made.
    noise = torch.randn(1, 4, head.in_features, generator=torch.Generator().manual_seed(0), device="cpu")
    probe = noise.to(head.weight)
    probe = probe * (50 / (probe @ head.weight.T).abs().max())

    def replace(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        output.last_hidden_state = probe
        return output

    handle = model.base_model.register_forward_hook(replace)
    try:
        logits = model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=probe.device), use_cache=False).logits
    finally:
        handle.remove()
    expected = probe @ head.weight.T
    return logits.shape == expected.shape and torch.allclose(logits.to(expected), expected, rtol=1e-3, atol=1e-2)
