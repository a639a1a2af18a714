"""Names models by what is in them, so that other weights under the same path are noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from lit_rlhf.assets import resolve
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import adapter_base
from lit_rlhf.models.reward import described

HASHED = (".safetensors", ".bin", ".json", ".py")  # weights, configs, and code that comes with a model


def model_digest(path: str) -> str:
    """Hash the files of a model, those of its members and of the base that adapters stand on included.

    Args:
        path: folder, adapter folder, hub id or `builtin:` name.

    Raises:
        UserError: the model's files are nowhere on this machine.
    """
    folder = _folder(path)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in HASHED:
            digest.update(file.relative_to(folder).as_posix().encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    base = _base(folder)
    return digest.hexdigest() + ("" if base is None else model_digest(base))


def weights_digest(model: nn.Module) -> str:
    """Hash the weights of a loaded model, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(-1).float().numpy().tobytes())
    return digest.hexdigest()


def _base(folder: Path) -> str | None:
    """Return the model outside the folder that its adapters, or those of its members, stand on."""
    content = described(str(folder)) or {}
    base = adapter_base(str(folder)) or content.get("base")
    whole = content.get("body") == "backbones"  # names where its bodies came from, and needs that no more
    member = base is not None and base in content.get("members", ())
    return None if whole or member else base


def _folder(path: str) -> Path:
    folder = Path(resolve(path))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its files are not on this machine, so no fingerprint can be taken") from error
