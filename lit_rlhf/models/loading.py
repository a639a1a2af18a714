"""Loading transformers and peft models with nothing left to chance: dtype, dropout, weights, adapters, shards.

Departures from `from_pretrained`: the dtype is the one asked for, never the folder's; dropout is zero everywhere
(LoRA's is as asked for); every weight must come from the folder; the model is left in train mode. A folder that holds a
LoRA adapter is loaded as its base model with the adapter merged in.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rlhf.types import UserError


@dataclass(frozen=True)
class LoRA:
    """Train low-rank updates of frozen matrices, W + (alpha / r) B A (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    Args:
        r: rank; >= 1.
        alpha: scale before division by `r`.
        dropout: on the update's input, in [0, 1).
        target_modules: module names, or one pattern; "all-linear" is every linear layer but the output head.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if self.r < 1:
            raise UserError(f"lora.r must be >= 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class ModelOptions:
    """How a body is loaded.

    Args:
        dtype: of the weights in memory; trainable weights want float32, a frozen reference may take less.
        attn_implementation: passed to transformers ("sdpa", "eager", "flash_attention_2"); None lets it choose.
        activation_checkpointing: recompute each layer in the backward pass: less memory, a third more time.
        trust_remote_code: run Python code that comes with the model.
        lora: train adapters only; None trains all weights.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    activation_checkpointing: bool = False
    trust_remote_code: bool = False
    lora: LoRA | None = None


def adapter_base(path: str) -> str | None:
    """Return the base model that a LoRA adapter folder names, or None where `path` is no adapter folder."""
    if not (Path(path) / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(path).base_model_name_or_path)


def load_config(path: str, options: ModelOptions) -> Any:
    """Read the transformers config of a model folder, with every dropout field set to zero."""
    from transformers import AutoConfig

    with _user_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    _disable_dropout(config)
    return config


def _disable_dropout(config: Any) -> None:
    """Set every dropout field to zero, in nested configs too; some act by function calls that no module switch reaches.

    Every architecture names its own (attn_pdrop, layerdrop, hidden_dropout_prob); "drop" is what they share.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _disable_dropout(value)
        elif "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))  # strict configs refuse a float where they declare an int


def load_model(kind: Any, path: str, options: ModelOptions, config: Any, new: tuple[str, ...] = ()) -> Any:
    """Load weights and prove that they are all there.

    Args:
        kind: a transformers Auto class.
        path: model folder or hub id.
        options: how to load.
        config: from `load_config`, possibly edited.
        new: parameter names that may be absent from the folder.

    Raises:
        UserError: no such model, or weights are missing or of another shape.
    """
    arguments: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "trust_remote_code": options.trust_remote_code}
    if options.attn_implementation is not None:
        arguments["attn_implementation"] = options.attn_implementation
    with _user_errors(path), _quiet():
        model, found = kind.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    absent = {str(name) for name in found["missing_keys"]} - set(new)
    absent |= {str(entry[0]) for entry in found["mismatched_keys"]}
    if absent:
        shown = ", ".join(sorted(absent)[:3])
        raise UserError(f"{path}: {len(absent)} weights are missing or of the wrong shape, such as {shown}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def add_lora(model: Any, lora: LoRA, task: str) -> Any:
    """Wrap a transformers model by trainable adapters.

    Args:
        model: a causal LM or sequence classifier.
        lora: what to add.
        task: peft's task type, "CAUSAL_LM" or "SEQ_CLS"; the latter trains and keeps the score head too.

    Raises:
        UserError: the targets match nothing, or the output head is one of them.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        with _quiet():
            wrapped = get_peft_model(model, lora_config(lora, task))
    except ValueError as error:
        raise UserError(f"lora.target_modules={_targets(lora)!r}: {_first_line(error)}") from error
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise UserError(
            f"lora.target_modules={lora.target_modules!r} matches the output head, which must stay as it is"
        )
    return wrapped


def inject_lora(transformer: Any, lora: LoRA) -> None:
    """Put trainable adapters into a body without a head, and freeze the rest.

    Raises:
        UserError: the targets match nothing.
    """
    from peft import inject_adapter_in_model

    pretrained = list(transformer.parameters())
    try:
        with _quiet():
            inject_adapter_in_model(lora_config(lora, "FEATURE_EXTRACTION"), transformer)
    except ValueError as error:
        raise UserError(f"lora.target_modules={_targets(lora)!r}: {_first_line(error)}") from error
    for parameter in pretrained:
        parameter.requires_grad_(requires_grad=False)


def lora_config(lora: LoRA, task: str) -> Any:
    """Return peft's configuration of an adapter, for "CAUSAL_LM" or "SEQ_CLS"."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_targets(lora), task_type=task
    )


def _targets(lora: LoRA) -> str | list[str]:
    return lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)


def merge_adapter(model: Any, path: str) -> Any:
    """Add an adapter folder's updates (and its score head, if any) to the weights; everything is trainable afterwards.

    Merged, so that a policy and its reference start from one and the same model.

    Raises:
        UserError: the adapter does not fit the model.
    """
    from peft import PeftModel

    with _user_errors(path), _quiet():
        merged = PeftModel.from_pretrained(model, path).merge_and_unload()
    return merged.requires_grad_(requires_grad=True).train()


def checkpoint_activations(model: Any, **how: Any) -> None:
    """Recompute layers in the backward pass; the non-reentrant form also works where no input needs a gradient.

    Args:
        model: a transformers model.
        how: further arguments of `torch.utils.checkpoint.checkpoint`.
    """
    how = {"use_reentrant": False} | how
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def decoder_layers(transformer: nn.Module, count: int) -> list[nn.Module]:
    """Find the `count` repeated layers of a transformer: its first module list of that length."""
    for module in transformer.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError(f"{type(transformer).__name__} keeps no list of {count} layers, so it cannot be sharded")


def run_transformer(transformer: Any, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """Run a body without its head: ids and masks [N, L] to last hidden states [N, L, H]."""
    positions = {"position_ids": position_ids} if accepts(transformer, "position_ids") else {}
    output = transformer(input_ids=ids, attention_mask=attention_mask.long(), use_cache=False, **positions)
    return output.last_hidden_state


def accepts(module: nn.Module, argument: str) -> bool:
    """Say whether a forward pass names an argument; models with relative positions take no `position_ids`."""
    return argument in _arguments(type(module).forward)


@functools.cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Gather a possibly sharded state dict on the CPU of rank 0; the other ranks get an empty one.

    A collective where the module is sharded: call it on all ranks. Tied weights stay one tensor under two names.
    """
    from torch.distributed.tensor import DTensor

    state: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in gathered:
            whole = value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
            gathered[id(value)] = whole.cpu() if is_writer() else whole.new_empty(0)
        state[name] = gathered[id(value)]
    return state if is_writer() else {}


def is_writer() -> bool:
    """Say whether this process writes files: rank 0, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while, and give every submodule its own previous mode back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, the report of unused or new weights (`load_model` checks them), and two warnings of peft.

    They say that peft asks for a property that transformers has renamed, and that it transposes GPT-2's layers.
    """
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            warnings.filterwarnings("ignore", ".*fan_in_fan_out.*", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _user_errors(path: str) -> Iterator[None]:
    """Turn the many ways in which a model fails to load into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        where = Path(path)
        if where.is_dir():
            what = f"the folder holds no model that transformers can load: {_first_line(error)}"
        elif where.exists():
            what = "this is a file; a model folder or a hub id was expected"
        else:
            what = "there is no such folder, and no such model could be fetched from the Hugging Face hub"
        raise UserError(f"{path}: {what}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
