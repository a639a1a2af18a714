"""Several named LoRA adapters on one copy of a model's weights, and switches that say which one is in use.

Only the layers' switches are turned. peft's own `set_adapter` and `disable_adapter` also toggle `requires_grad`, which
the gathered copies of FSDP2 parameters would not follow, and which would let an optimizer forget its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lit_rlhf.models.loading import LoRA, lora_config
from lit_rlhf.types import UserError

POLICY = "default"  # what peft calls the first adapter


def lora_layers(model: nn.Module) -> list[Any]:
    """Return the layers that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def add_adapter(model: Any, name: str, lora: LoRA, *, trainable: bool) -> None:
    """Put one more adapter on a model that has some; those there stay in use and keep their gradients.

    Raises:
        UserError: the name is taken, the targets match nothing, or the output head is one of them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if name in model.peft_config:
        raise UserError(f"the model has an adapter {name!r} already")
    known = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.add_adapter(name, lora_config(lora, "CAUSAL_LM"))
    except ValueError as error:
        raise UserError(f"lora.target_modules={lora.target_modules!r}: {error}") from error
    if isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"lora.target_modules={lora.target_modules!r} matches the output head, which must stay as it is"
        )
    for parameter in model.parameters():  # by identity: a layer's first adapter renames its weight
        parameter.requires_grad_(known.get(parameter, trainable))


@contextmanager
def using(model: nn.Module, name: str) -> Iterator[None]:
    """Run a model with one named adapter alone, also where all were off.

    Raises:
        UserError: no layer has this adapter.
    """
    layers = lora_layers(model)
    having = [name in layer.lora_A or name in layer.lora_embedding_A for layer in layers]
    if not any(having):
        raise UserError(f"the model has no adapter {name!r}")
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]  # noqa: SLF001
    try:
        for layer, has in zip(layers, having, strict=True):
            layer._active_adapter, layer._disable_adapters = [name], not has  # noqa: SLF001
        yield
    finally:
        for layer, (active, off) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, off  # noqa: SLF001


@contextmanager
def without(layers: list[Any]) -> Iterator[None]:
    """Run layers without their adapters."""
    before = [layer._disable_adapters for layer in layers]  # noqa: SLF001
    for layer in layers:
        layer._disable_adapters = True  # noqa: SLF001
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off  # noqa: SLF001
