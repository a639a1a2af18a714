"""The reference's log-probabilities of a preference data set, kept on disk.

The file's name is a fingerprint of everything that the numbers depend on, so that a changed model, tokenizer, template,
data set or length finds no file. What a fingerprint cannot see is caught by comparing a few rows with live values.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lit_rlhf.encoding import Encoder
from lit_rlhf.models.digest import model_digest
from lit_rlhf.types import UserError


@dataclass(frozen=True)
class ReferenceCache:
    """Log-probabilities of n pairs under the reference, by row number in the data set.

    Args:
        chosen: [n], nats, summed over the response tokens; NaN where not computed.
        rejected: [n], likewise.
        source: the file they are from, for messages.
    """

    chosen: Tensor
    rejected: Tensor
    source: str = "the computed reference"

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str) -> Self | None:
        """Read the file of this fingerprint; None where there is none.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = _file(folder, fingerprint)
        if not file.is_file():
            return None
        try:
            return cls(**load_file(file), source=str(file))
        except (SafetensorError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); delete it and it will be made anew") from error

    def save(self, folder: str | Path, fingerprint: str) -> Path:
        """Write the file of this fingerprint and return its path; a reader never sees half of it."""
        from safetensors.torch import save_file

        file = _file(folder, fingerprint)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({name: getattr(self, name).float().cpu().contiguous() for name in ("chosen", "rejected")}, part)
        part.replace(file)
        return file

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return chosen and rejected log-probabilities, each [B], of the rows `index` [B], on its device.

        Raises:
            UserError: a row is not in the cache.
        """
        where = index.cpu()
        inside = (where >= 0) & (where < len(self.chosen))
        known = inside & ~self.chosen[where * inside].isnan()
        if not known.all():
            raise UserError(f"{self.source} has no row {int(where[~known][0])}; it was made from other data")
        return self.chosen[where].to(index.device), self.rejected[where].to(index.device)

    def verify(self, index: Tensor, chosen: Tensor, rejected: Tensor, tolerance: float = 1e-3) -> None:
        """Compare some rows with live values.

        Args:
            index: [B], row numbers.
            chosen: [B], computed just now, nats.
            rejected: [B], likewise.
            tolerance: of the difference, relative to the larger of 1 nat and the value.

        Raises:
            UserError: naming the row that differs most and both of its values.
        """
        cached = torch.cat(self.rows(index)).double()
        live = torch.cat([chosen, rejected]).to(cached)
        difference = (cached - live).abs() / live.abs().clamp_min(1)
        worst = int(difference.nan_to_num(torch.inf).argmax())
        if not difference[worst] <= tolerance:
            row, side = int(index[worst % len(index)]), ("chosen", "rejected")[worst // len(index)]
            raise UserError(
                f"{self.source}: row {row}, {side}: {cached[worst]:.4f} nats are kept but the reference gives "
                f"{live[worst]:.4f}; delete the file and it will be made anew"
            )


def fingerprint(path: str, encoder: Encoder, data: str, **settings: Any) -> str:
    """Hash what reference log-probabilities depend on.

    Args:
        path: the reference: folder, adapter folder (its base is hashed too), hub id or `builtin:` name.
        encoder: tokenizer, template, joiner and window.
        data: the data set's own fingerprint.
        settings: further plain values, such as the dtype.

    Raises:
        UserError: the model's files are nowhere on this machine.
    """
    parts = {
        "model": model_digest(path),
        "tokenizer": _tokenizer_description(encoder.tokenizer),
        "stop_ids": list(encoder.stop_ids),
        "joiner": encoder.joiner,
        "max_length": encoder.max_length,
        "keep_end": encoder.keep_end,
        "data": data,
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_description(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocab": sorted(tokenizer.get_vocab().items())} if backend is None else json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # left behind by the last call, and of no effect here
        rules.pop(state, None)
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return {"rules": rules, "special": special, "template": getattr(tokenizer, "chat_template", None)}


def _file(folder: str | Path, fingerprint: str) -> Path:
    return Path(folder) / f"reference-{fingerprint[:24]}.safetensors"
