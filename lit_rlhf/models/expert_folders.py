"""Experts as ordinary reward model folders: written so that plain transformers and peft load them, and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.models.experts import ExpertBody
from lit_rlhf.models.loading import LoRA, ModelOptions, adapter_base, full_state_dict, is_writer
from lit_rlhf.models.reward import DESCRIBED, RewardModel, score_scale
from lit_rlhf.types import UserError


@dataclass(frozen=True)
class ExpertFolder:
    """One reward model to write, or one that was read.

    Args:
        folder: its place.
        head: [H] to one score.
        slots: the experts whose updates are summed; empty for the body alone.
        mean: of its scores on held-out responses; NaN where it was not measured.
        std: of the same; > 0.
    """

    folder: Path
    head: nn.Linear
    slots: tuple[int, ...] = ()
    mean: float = math.nan
    std: float = math.nan


def write_experts(body: ExpertBody, items: Sequence[ExpertFolder], tokenizer: Any, *, merged: bool = False) -> None:
    """Write each item as `RewardModel.export` would; call it on all ranks, rank 0 writes.

    A sum of S experts of rank r becomes one adapter of rank S r.

    Args:
        body: what the experts stand on.
        items: what to write and where.
        tokenizer: saved beside each.
        merged: full models in place of adapters.
    """
    state = full_state_dict(body.transformer)
    heads = [full_state_dict(item.head) for item in items]
    if not is_writer():
        return
    for item, head in zip(items, heads, strict=True):
        model = _plain(body, state, item.slots)
        model.head.load_state_dict(head)
        model.set_scale(item.mean, item.std)
        model.export(item.folder, tokenizer, merged=merged)


def read_experts(folders: Sequence[Path], options: ModelOptions) -> tuple[ExpertBody, list[ExpertFolder]]:
    """Load adapter folders of one base as the experts of one body, in their order.

    Args:
        folders: E folders that `write_experts` or `RewardModel.export` wrote.
        options: how to load; the adapters themselves say rank, scale, dropout and targets.

    Raises:
        UserError: a folder holds no adapter, or two differ in base, rank, scale, dropout or targets.
    """
    from peft import load_peft_weights

    base, lora = _common(folders)
    body = ExpertBody(base, replace(options, lora=lora), len(folders))
    items = []
    for slot, folder in enumerate(folders):
        described = json.loads((folder / DESCRIBED).read_text())
        state = load_peft_weights(str(folder), device="cpu")
        _fill(body, slot, state)
        head = body.new_head(slot)
        head.load_state_dict({n: state[f"base_model.model.score.{n}"] for n in head.state_dict()})
        items.append(ExpertFolder(folder, head, (slot,), *score_scale(described)))
        if described["vocab_size"] > body.transformer.get_input_embeddings().num_embeddings:
            body.transformer.resize_token_embeddings(described["vocab_size"], mean_resizing=False)
    return body, items


def _common(folders: Sequence[Path]) -> tuple[str, LoRA]:
    """Return the base and the settings that all adapters share."""
    from peft import PeftConfig

    found = []
    for folder in folders:
        base = adapter_base(str(folder))
        if base is None or not (folder / DESCRIBED).is_file():
            raise UserError(f"{str(folder)!r} holds no LoRA reward model (adapter_config.json and {DESCRIBED})")
        config: Any = PeftConfig.from_pretrained(str(folder))
        targets = config.target_modules
        targets = targets if isinstance(targets, str) else tuple(sorted(targets))
        found.append((base, LoRA(config.r, config.lora_alpha, config.lora_dropout, targets)))
        if found[-1] != found[0]:
            raise UserError(f"{str(folder)!r} has {found[-1]}, {str(folders[0])!r} has {found[0]}; experts share these")
    return found[0]


@torch.no_grad()
def _fill(body: ExpertBody, slot: int, state: Mapping[str, Tensor]) -> None:
    """Copy one adapter's matrices into a slot."""
    for name, layer in body.expert_layers.items():
        key = f"base_model.model.{body.prefix}.{name}"
        layer.A[slot] = state[f"{key}.lora_A.weight"].T
        layer.B[slot] = state[f"{key}.lora_B.weight"].T


@torch.no_grad()
def _plain(body: ExpertBody, state: Mapping[str, Tensor], slots: tuple[int, ...]) -> RewardModel:
    """Return an ordinary reward model of the body (its gathered `state`) with some experts added up."""
    lora = body.options.lora
    if lora is None:
        model = RewardModel(body.path, body.options)
        model.classifier.base_model.load_state_dict(state)
        return model
    if not slots:
        return RewardModel(body.path, replace(body.options, lora=None))
    summed = replace(lora, r=lora.r * len(slots), alpha=lora.alpha * len(slots))
    model = RewardModel(body.path, replace(body.options, lora=summed))
    for name in body.expert_layers:
        layer: Any = model.classifier.base_model.get_submodule(name)
        down, up = (state[f"{name}.{which}"][list(slots)] for which in ("A", "B"))
        layer.lora_A["default"].weight.copy_(down.transpose(1, 2).flatten(0, 1))
        layer.lora_B["default"].weight.copy_(up.flatten(0, 1).T)
    return model
