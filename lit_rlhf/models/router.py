"""A router: which category of tasks does a prompt belong to?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.encoding import Encoder
from lit_rlhf.models.loading import (
    ModelOptions,
    add_lora,
    checkpoint_activations,
    decoder_layers,
    full_state_dict,
    is_writer,
    load_config,
    load_model,
    run_transformer,
)
from lit_rlhf.models.reward import last_token
from lit_rlhf.types import Prompt, Sequences, UserError


class RouterModel(nn.Module):
    """p(category | prompt) = softmax(W h[last real token]), h the states of the user's turns.

    Quan 2024, arXiv:2403.01197, outer layer. Departure from the released code: the body's weights are loaded, and the
    loss takes the logits as they are.

    Args:
        path: causal LM folder, router folder, or hub id.
        categories: names in the order of the logits; None reads them from a router folder.
        options: dtype, attention, checkpointing, LoRA (the head is then trained in full beside the adapters).

    Attributes:
        categories: names in the order of the logits.

    Raises:
        UserError: no such model, no categories, or a router folder of other categories.
    """

    def __init__(self, path: str, categories: Sequence[str] | None = None, options: ModelOptions | None = None) -> None:
        super().__init__()
        from lit_rlhf.assets import resolve

        self.path = resolve(path)
        self.options = options or ModelOptions()
        model = _load_classifier(self.path, categories, self.options)
        self.categories = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
        self.model: Any = add_lora(model, self.options.lora, "SEQ_CLS") if self.options.lora else model
        if self.options.activation_checkpointing:
            checkpoint_activations(self.classifier)

    @property
    def classifier(self) -> Any:
        """The transformers model inside, its layers carrying the adapters where there are any."""
        return self.model.get_base_model() if self.options.lora else self.model

    @property
    def head(self) -> nn.Linear:
        """The layer that makes the logits."""
        head: Any = self.classifier.score
        return head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head

    def forward(self, sequences: Sequences) -> Tensor:
        """Return logits [B, C], float32, of B prompts, padded on either side."""
        hidden = run_transformer(
            self.classifier.base_model, sequences.ids, sequences.attention_mask, sequences.position_ids
        )
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last_token(sequences.attention_mask)]
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.to(self.head.weight.dtype)).float()

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard the parameters over a device mesh by FSDP2; the head stays in float32 whatever `mp_policy` says."""
        from torch.distributed.fsdp import fully_shard

        how = {"mesh": mesh} | ({"mp_policy": mp_policy} if mp_policy is not None else {})
        model = self.classifier
        for layer in decoder_layers(model.base_model, model.config.get_text_config().num_hidden_layers):
            fully_shard(layer, **how)
        fully_shard(self.head, mesh=mesh)
        fully_shard(self, **how)

    def export(self, folder: str | Path, tokenizer: Any) -> None:
        """Write a sequence classifier that plain transformers loads, adapters merged in; call it on all ranks.

        It is to be given the user's turns, a line each, and the end token. Plain transformers finds the last token by
        the padding id, so a tokenizer whose padding is its end token gets another one, which needs no new embedding:
        the masks hide it.
        """
        state = full_state_dict(self.model)
        if not is_writer():
            return
        model = self.model
        if self.options.lora:
            copy = RouterModel(self.path, self.categories, self.options)
            copy.model.load_state_dict(state)
            model = copy.model.merge_and_unload()
            state = model.state_dict()
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
        state = _with_padding_row(model, state, tokenizer.pad_token_id)
        model.save_pretrained(folder, state_dict=state)
        config = type(model.config).from_dict(model.config.to_dict())
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, tokenizer.pad_token_id + 1)
        config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class Router:
    """A router folder at work: prompts in, probabilities of the categories out.

    Args:
        path: folder that `RouterModel.export` wrote, or hub id of a sequence classifier.
        batch_size: prompts in one forward pass; >= 1.
        max_length: window in tokens; None takes the model's, at most 1024. Longer prompts keep their end.
        device: None takes the current GPU where there is one, else the CPU.
    """

    def __init__(
        self, path: str, batch_size: int = 64, *, max_length: int | None = None, device: str | None = None
    ) -> None:
        if batch_size < 1:
            raise UserError(f"Router: batch_size must be >= 1, got {batch_size}")
        self.path, self.batch_size, self.max_length, self.device = path, batch_size, max_length, device
        self._loaded: tuple[RouterModel, Encoder] | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """Names in the order of the probabilities."""
        return self._load()[0].categories

    def probabilities(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return p(category | prompt), [B, C], float32, on the CPU."""
        model, encoder = self._load()
        return routing_probabilities(model, encoder, prompts, self.batch_size)

    def route(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the most probable category of each prompt."""
        return [self.categories[i] for i in self.probabilities(prompts).argmax(-1).tolist()]

    def _load(self) -> tuple[RouterModel, Encoder]:
        if self._loaded is None:
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = RouterModel(self.path).requires_grad_(requires_grad=False).eval().to(device)
            self._loaded = model, Encoder.from_pretrained(self.path, max_length=self.max_length)
        return self._loaded


@torch.no_grad()
def routing_probabilities(
    model: RouterModel, encoder: Encoder, prompts: Sequence[Prompt], batch_size: int = 64
) -> Tensor:
    """Return p(category | prompt) of a model in eval mode, [B, C], float32, on the CPU."""
    rows = encoder.questions(prompts)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found = torch.zeros(len(rows), len(model.categories))
    device = model.head.weight.device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found[chosen] = model(encoder.collate([rows[i] for i in chosen]).to(device)).softmax(-1).cpu()
    return found


def _load_classifier(path: str, categories: Sequence[str] | None, options: ModelOptions) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = load_config(path, options)
    ready = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    found = tuple(config.id2label[i] for i in range(config.num_labels)) if ready else None
    if categories is None and (found is None or len(found) < 2):
        raise UserError(f"{path}: this is no router (a sequence classifier with two categories or more was expected)")
    names = tuple(categories or found or ())
    ready = ready and found == names
    if not ready:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    new = () if ready else ("score.weight", "score.bias")
    model = load_model(AutoModelForSequenceClassification, path, options, config, new)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{path}: {type(model).__name__} has no linear head called `score`")
    model.score.float()
    if not ready:
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model


def _with_padding_row(model: Any, state: dict[str, Tensor], padding: int) -> dict[str, Tensor]:
    embeddings = model.get_input_embeddings()
    name = next(key for key, module in model.named_modules() if module is embeddings) + ".weight"
    missing = padding + 1 - state[name].shape[0]
    if missing <= 0:
        return state
    return state | {name: torch.cat([state[name], state[name].new_zeros(missing, state[name].shape[1])])}
