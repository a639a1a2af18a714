"""K reward models as one: LoRA experts or heads on one shared body, or K whole models.

Legend: N sequences, K members, H width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_rlhf.models.expert_folders import ExpertFolder, read_experts, write_experts
from lit_rlhf.models.experts import ExpertBody
from lit_rlhf.models.loading import ModelOptions, is_writer
from lit_rlhf.models.reward import FORM_FILE, described
from lit_rlhf.types import Sequences, UserError, numbered

Mode = Literal["lora", "full", "heads"]
FORM = "reward_ensemble"


class Heads(nn.Module):
    """K score heads in float32, each for its own states."""

    def __init__(self, heads: Iterable[nn.Linear]) -> None:
        super().__init__()
        self.each = nn.ModuleList(heads)

    def forward(self, states: Tensor) -> Tensor:
        """Map [K, N, H] to raw scores [K, N]."""
        with torch.autocast(states.device.type, enabled=False):
            return torch.stack([head(own)[:, 0] for head, own in zip(self.each, states.float(), strict=True)])


class RewardEnsemble(nn.Module):
    """K reward models that score the same sequences, or each its own, in one forward pass.

    Coste et al. 2023, arXiv:2310.02743, section 3: members share data and pretrained weights.

    Args:
        bodies: one body with K experts ("lora"), one frozen body ("heads"), or K bodies ("full").
        heads: K score heads.
        mode: which of these it is.

    Attributes:
        score_mean: [K], each member's mean score on held-out responses; NaN until set.
        score_std: [K], their standard deviations; NaN until set.
        sharded: whether `shard` was called.
    """

    score_mean: Tensor
    score_std: Tensor

    def __init__(self, bodies: Sequence[ExpertBody], heads: Sequence[nn.Linear], mode: Mode) -> None:
        super().__init__()
        self.bodies, self.heads, self.mode = nn.ModuleList(bodies), Heads(heads), mode
        self.register_buffer("score_mean", torch.full((len(heads),), torch.nan))
        self.register_buffer("score_std", torch.full((len(heads),), torch.nan))
        if mode == "heads":
            self.bodies.requires_grad_(requires_grad=False)
        self.sharded = False

    @property
    def members(self) -> int:
        """K."""
        return len(self.score_mean)

    def forward(self, sequences: Sequences) -> Tensor:
        """Score N sequences by all members: raw scores [N, K], float32."""
        if self.mode == "lora":
            return self.forward_grouped(_repeated(sequences, self.members)).T
        states = torch.stack([body(sequences) for body in self.bodies])
        scores: Tensor = self.heads(states.expand(self.members, -1, -1))
        return scores.T

    def forward_grouped(self, sequences: Sequences) -> Tensor:
        """Score K N sequences, each by its own member: rows are member after member, raw scores [K, N], float32."""
        if self.mode == "full":
            groups = zip(self.bodies, _chunks(sequences, self.members), strict=True)
            states = torch.stack([body(group) for body, group in groups])
        else:
            slots = torch.arange(self.members, device=sequences.ids.device)[:, None]
            states = self.bodies[0](sequences, slots if self.mode == "lora" else None)
        scores: Tensor = self.heads(states.view(self.members, -1, states.shape[-1]))
        return scores

    @property
    def scaled(self) -> bool:
        """Whether every member keeps a scale."""
        return bool(self.score_std.isfinite().all())

    def standardise(self, scores: Tensor) -> Tensor:
        """Put raw scores [N, K] on one scale: each member less its mean, over its standard deviation.

        Raises:
            UserError: a member keeps no scale: none was measured, or it scored everything alike.
        """
        if not self.scaled:
            bare = (~self.score_std.isfinite()).nonzero()[:, 0].tolist()
            raise UserError(
                f"members {bare} of {self.members} keep no mean and standard deviation of their scores, so the scores"
                " cannot be put on one scale: a `fit` measures them in its validation, unless a member scores all"
                " responses alike; expected such a fit, or raw: true"
            )
        return (scores - self.score_mean.to(scores)) / self.score_std.to(scores)

    @torch.no_grad()
    def set_scale(self, mean: Tensor, std: Tensor) -> None:
        """Keep each member's mean and standard deviation, [K], of the scores on held-out responses; NaN for none.

        Raises:
            UserError: a spread that is not a positive number.
        """
        none = mean.isnan() & std.isnan()
        if not ((mean.isfinite() & std.isfinite() & (std > 0)) | none).all():
            raise UserError(f"members' means must be finite and stds positive, got {mean.tolist()} and {std.tolist()}")
        self.score_mean.copy_(mean)
        self.score_std.copy_(std)

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> Tensor:
        """Bound the norm of each member's own gradient, so that no member shrinks another's step.

        Args:
            limit: largest norm; as `torch.nn.utils.clip_grad_norm_` does it for a member alone.

        Returns:
            The norms before, [K].
        """
        layers = [layer for body in self.bodies for layer in body.expert_layers.values()]  # type: ignore[operator]
        stacked = [p.grad for layer in layers for p in (layer.A, layer.B) if p.grad is not None]
        parts = zip(self.bodies, self.heads.each, strict=True) if self.mode == "full" else zip(self.heads.each)
        own = [[p.grad for part in member for p in part.parameters() if p.grad is not None] for member in parts]
        squares = torch.stack([sum((_whole(g.square().sum()) for g in member), torch.zeros(())) for member in own])
        for gradient in stacked:
            squares = squares + _whole(gradient.square().flatten(1).sum(1))
        factors = (limit / (squares.sqrt() + 1e-6)).clamp_max(1)
        for gradient in stacked:
            _multiply(gradient, factors.view(-1, *[1] * (gradient.ndim - 1)))
        for member, factor in zip(own, factors, strict=True):
            for gradient in member:
                _multiply(gradient, factor.expand(gradient.shape))
        return squares.sqrt()

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard the parameters over a device mesh by FSDP2; the heads stay in float32 whatever `mp_policy` says."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for body in self.bodies:
            body.shard(mesh, mp_policy)  # type: ignore[operator]
        fully_shard(self.heads, mesh=mesh)
        fully_shard(self, mesh=mesh)
        register_fsdp_forward_method(self, "forward_grouped")
        self.sharded = True

    def export(self, folder: str | Path, tokenizer: Any, *, merged: bool = False) -> None:
        """Write each member as an ordinary reward model folder, and `reward.json` over them; call it on all ranks.

        Layout: `reward.json` with `form`, `mode`, `base` (whose config counts) and the folders of the `members`, in
        order; `member-0/` and so on, each as `RewardModel.export` writes it (an adapter folder with "lora"); the
        tokenizer.

        Args:
            folder: where to; made if absent.
            tokenizer: of this model.
            merged: with "lora", write full members, which reload as mode "full".
        """
        names = [f"member-{member}" for member in range(self.members)]
        scales = zip(self.score_mean.tolist(), self.score_std.tolist(), strict=True)
        items = [
            ExpertFolder(Path(folder) / name, head, (k,) if self.mode == "lora" else (), *scale)  # type: ignore[arg-type]
            for k, (name, head, scale) in enumerate(zip(names, self.heads.each, scales, strict=True))
        ]
        for body, group in zip(self.bodies, [items] if len(self.bodies) == 1 else [[i] for i in items], strict=True):
            write_experts(body, group, tokenizer, merged=merged)  # type: ignore[arg-type]
        if not is_writer():
            return
        adapters = (Path(folder) / names[0] / "adapter_config.json").exists()
        mode = "full" if self.mode == "lora" and not adapters else self.mode
        base = self.bodies[0].path if adapters else names[0]
        content = {"form": FORM, "mode": mode, "base": base, "members": names}
        (Path(folder) / FORM_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)


def new_ensemble(
    path: str, options: ModelOptions, members: int | Sequence[int], mode: Mode = "lora", *, seed: int = 0
) -> RewardEnsemble:
    """Build members that differ by seed alone: in the start of their heads, and of their adapters with "lora".

    Args:
        path: causal LM or reward model folder, or hub id; a reward model's head is kept by all members.
        options: how to load; `lora` belongs to mode "lora" alone.
        members: how many, or their numbers: member k of (seed, k) starts the same whoever trains beside it.
        mode: "lora", "full" (K copies of the body), or "heads" (K heads on a frozen body).
        seed: of the members.

    Raises:
        UserError: no member, an unknown mode, or `options.lora` missing or out of place.
    """
    numbers = numbered("members", members)
    if mode not in get_args(Mode):
        raise UserError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if (mode == "lora") != (options.lora is not None):
        raise UserError(f"mode {mode!r} with lora {options.lora}: expected `lora` in mode 'lora' and in no other")
    count = len(numbers) if mode == "full" else 1
    bodies = [ExpertBody(path, options, numbers if mode == "lora" else 0, seed=seed) for _ in range(count)]
    return RewardEnsemble(bodies, [bodies[0].new_head(number) for number in numbers], mode)


def load_ensemble(path: str, options: ModelOptions) -> RewardEnsemble:
    """Load a folder that `RewardEnsemble.export` wrote; `options.lora` is the folder's own.

    Raises:
        UserError: no such folder, or one of another form.
    """
    content = described(path)
    if content is None or content["form"] != FORM:
        raise UserError(f"{path!r} holds no ensemble of reward models ({FORM_FILE} with form {FORM!r} was expected)")
    mode: Mode = content["mode"]
    folders = [Path(path) / name for name in content["members"]]
    if mode == "lora":
        body, items = read_experts(folders, options)
        ensemble = RewardEnsemble([body], [item.head for item in items], mode)
        scales = [(item.mean, item.std) for item in items]
    else:
        models = [ExpertBody(str(folder), options) for folder in folders]
        scales = [model.folder_scale for model in models]
        ensemble = RewardEnsemble(models if mode == "full" else models[:1], [m.new_head(0) for m in models], mode)
    mean, std = torch.tensor(scales).unbind(-1)
    ensemble.set_scale(mean, std)
    return ensemble


def _repeated(sequences: Sequences, times: int) -> Sequences:
    return Sequences(*(getattr(sequences, f.name).repeat(times, 1) for f in fields(sequences)))


def _whole(values: Tensor) -> Tensor:
    """Return what all processes hold together of a possibly sharded tensor."""
    from torch.distributed.tensor import DTensor

    return values.full_tensor() if isinstance(values, DTensor) else values


def _multiply(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a possibly sharded gradient in place, by a factor that fits the whole of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    factor = factor.to(gradient.dtype)
    if isinstance(gradient, DTensor):
        factor = distribute_tensor(factor.contiguous(), gradient.device_mesh, gradient.placements).to_local()
        gradient = gradient.to_local()
    gradient.mul_(factor)


def _chunks(sequences: Sequences, count: int) -> list[Sequences]:
    parts = [getattr(sequences, f.name).chunk(count) for f in fields(sequences)]
    return [Sequences(*part) for part in zip(*parts, strict=True)]
