"""From a path to a model: a run folder, a Lightning checkpoint of ours, or a Hugging Face folder or hub id."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from lit_rlhf import modules
from lit_rlhf.assets import resolve
from lit_rlhf.errors import UserError
from lit_rlhf.models.ensemble import FORM as ENSEMBLE
from lit_rlhf.models.loading import adapter_base
from lit_rlhf.models.reward import described
from lit_rlhf.modules.base import MODULE_KEY, BaseModule
from lit_rlhf.modules.policy import PolicyModule


def load(name: str) -> BaseModule:
    """Return a module with its weights, in eval mode, on the CPU.

    Args:
        name: a run folder (its last checkpoint), a `.ckpt` file, or a model folder, hub id or `builtin:` name.

    Raises:
        UserError: there is nothing of that kind.
    """
    path = Path(name)
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last.ckpt"
        if not path.exists():
            raise UserError(f"the run folder {name!r} holds no checkpoints/last.ckpt")
    module = load_checkpoint(path) if path.suffix == ".ckpt" else load_pretrained(name)
    module.eval()
    return module


def load_policy(name: str) -> PolicyModule:
    """Return a policy, as `load` does.

    Raises:
        UserError: there is nothing of that kind, or it is a reward model.
    """
    module = load(name)
    if not isinstance(module, PolicyModule):
        raise UserError(f"{name!r} is a reward model: it scores responses (`predict`) and samples none")
    return module


def load_checkpoint(path: Path) -> BaseModule:
    """Return the module that a checkpoint file was made by.

    Raises:
        UserError: the file is missing, is no checkpoint of ours, or is sharded.
    """
    if not path.exists():
        raise UserError(f"no checkpoint at {str(path)!r}")
    if path.is_dir():
        raise UserError(
            f"{str(path)!r} is sharded; `python -m lightning.pytorch.utilities.consolidate_checkpoint` first"
        )
    kinds: list[type[BaseModule]] = [getattr(modules, name) for name in modules.__all__]
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}
    made_by = maker(path)
    if made_by not in known:
        raise UserError(f"{str(path)!r} was made by {made_by}; expected one of {', '.join(known)}")
    # a file from a stranger must not choose code to run: neither the model's own, nor a scorer's
    safe: dict[str, Any] = {"trust_remote_code": False}
    if issubclass(known[made_by], PolicyModule):
        safe["proxy"] = None
    module = known[made_by].load_from_checkpoint(path, map_location="cpu", weights_only=True, **safe)
    assert isinstance(module, BaseModule)
    return module


def maker(path: Path) -> str:
    """Return the class path of the module that made a checkpoint file, reading nothing but plain types and tensors.

    Raises:
        UserError: the file is no checkpoint of this package.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    made_by = content.get(MODULE_KEY) if isinstance(content, dict) else None
    if not isinstance(made_by, str):
        raise UserError(f"{str(path)!r} was made by another program; expected a checkpoint of lit_rlhf")
    return made_by


def load_pretrained(name: str) -> BaseModule:
    """Return a policy or reward module around a model folder, by the architecture in its configuration.

    Raises:
        UserError: there is no model of that name.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    path = resolve(name)
    content = described(path)
    if content is not None:
        return _of_form(name, content)
    adapter = adapter_base(path)
    try:
        config = AutoConfig.from_pretrained(adapter or path)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} is no run folder, checkpoint or model: {str(error).splitlines()[0]}") from error
    scorer = set(config.architectures or []) & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
    scorer |= {"score.json"} if (Path(path) / "score.json").is_file() else set()  # what a LoRA reward model leaves
    kind = modules.RewardModule if scorer else modules.SFTModule
    module = kind(model_name_or_path=name)
    module.configure_model()
    return module


def _of_form(name: str, content: dict[str, Any]) -> BaseModule:
    """Return the module of a folder of several parts."""
    if content["form"] != ENSEMBLE:
        raise UserError(
            f"{name!r} has the form {content['form']!r}, which `predict` scores with and no module goes on from"
        )
    module = modules.RewardEnsembleModule(
        model_name_or_path=name, members=len(content["members"]), mode=content["mode"]
    )
    module.configure_model()
    return module
