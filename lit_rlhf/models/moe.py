"""DMoERM: a double layer of experts, by category of task and by capability point (Quan 2024, arXiv:2403.01197).

Legend: N rows, C categories, k_c points of category c, K the most of them, H width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rlhf.models.experts import ExpertBody, ExpertLinear
from lit_rlhf.models.loading import LoRA, ModelOptions
from lit_rlhf.types import Sequences, UserError

Form = Literal["shared", "backbones"]
Inner = Literal["none", "mean", "mixture"]
INNERS: tuple[Inner, ...] = ("none", "mean", "mixture")  # in the order in which the phases make them possible


class MoE(nn.Module):
    """One reward model a category, each made of one expert a capability point.

    phase 1:  s = w_c . h_c                        h_c: last real token's state, category c's weights
    phase 2:  s_i = w_ci . z_i                     z_i: the same with point i's adapter on top
    phase 3:  r = Linear(PReLU(Linear(concat z)))  k_c H -> H -> 1

    `inner` says which is the score: phase 1's ("none"), the mean of phase 2's ("mean") or phase 3's ("mixture").

    Departures from the released code:
    1. "shared", the default form, has one frozen body with an adapter a category in place of C bodies. "backbones" is
       the paper's: C bodies, each trained as a whole in phase 1 and frozen afterwards.
    2. Each point's head is a registered module, trained, and kept for explanations.
    3. Scores of different categories are brought to one scale by their mean and spread on held-out responses.

    Args:
        path: causal LM or reward model folder, or hub id; one for each category where "backbones" start from different
            ones.
        points: category to its capability points, both in the order that is kept; k_c may differ.
        options: how to load; `lora` describes every adapter.
        form: "shared" or "backbones".
        seed: of adapters, heads and mixtures.

    Attributes:
        categories: names in order.
        points: category to names in order.
        score_mean: [3, C], mean score on held-out responses of the data, a row for each of `INNERS`; 0 until set.
        score_std: [3, C], their standard deviation; 1 until set.
        point_mean: [P], the same for the points, one category's after the other's.
        point_std: [P], the same.

    Raises:
        UserError: no such model, no category, or several models in the shared form.
    """

    score_mean: Tensor
    score_std: Tensor
    point_mean: Tensor
    point_std: Tensor
    counts: Tensor
    offsets: Tensor

    def __init__(
        self,
        path: str | Sequence[str],
        points: Mapping[str, Sequence[str]],
        options: ModelOptions,
        *,
        form: Form = "shared",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not points:
            raise UserError("a DMoERM needs at least one category")
        self.points = {category: tuple(names) for category, names in points.items()}
        self.categories = tuple(self.points)
        options = options if options.lora else replace(options, lora=LoRA())
        self.form, self.options, self.seed = form, options, seed
        counts = [len(names) for names in self.points.values()]
        self.register_buffer("counts", torch.tensor(counts), persistent=False)
        self.register_buffer("offsets", torch.tensor([0, *counts]).cumsum(0)[:-1], persistent=False)
        for name, shape, value in (
            ("score_mean", (len(INNERS), len(counts)), 0.0),
            ("score_std", (len(INNERS), len(counts)), 1.0),
            ("point_mean", (sum(counts),), 0.0),
            ("point_std", (sum(counts),), 1.0),
        ):
            self.register_buffer(name, torch.full(shape, value, dtype=torch.float32))
        paths = [path] * len(counts) if isinstance(path, str) else list(path)
        if len(set(paths)) > 1 and form == "shared":
            raise UserError(f'form "shared" has one body for all categories, got {paths}')
        self.bodies = nn.ModuleList(_bodies(paths, counts, options, form, seed))
        self.path = self.body.path
        self.width = self.body.width
        heads = [self.body.new_head(c) for c in range(len(counts))]
        self.task_heads = nn.ModuleList(heads)
        self.point_heads = nn.ModuleList(copy.deepcopy(heads[c]) for c, k in enumerate(counts) for _ in range(k))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mixtures = nn.ModuleList(_mixture(k, self.width) if k else nn.Identity() for k in counts)

    @property
    def body(self) -> ExpertBody:
        """The one body of the shared form; the first category's otherwise."""
        first = self.bodies[0]
        assert isinstance(first, ExpertBody)
        return first

    def task(self, sequences: Sequences, category: Tensor) -> Tensor:
        """Score by the category alone, phase 1: raw scores [N]."""
        return _read(self._states(sequences, category, None), self.task_heads, category)

    def point(self, sequences: Sequences, category: Tensor, point: Tensor) -> Tensor:
        """Score each row at one capability point, `point` [N] counted within its category: raw scores [N]."""
        states = self._states(sequences, category, point)
        return _read(states, self.point_heads, self.offsets[category] + point)

    def states(self, sequences: Sequences, category: Tensor) -> Tensor:
        """Return the states of all points of each row's category, [N, K, H]; zero beyond its k_c points."""
        counts = self.counts[category]
        rows = torch.arange(len(category), device=category.device).repeat_interleave(counts)
        point = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        found = self._states(select(sequences, rows), category[rows], point)
        return found.new_zeros(len(category), int(self.counts.max()), self.width).index_put((rows, point), found)

    def point_scores(self, states: Tensor, category: Tensor) -> Tensor:
        """Read all points off their states: raw scores [N, K], NaN beyond the category's points."""
        point = torch.arange(states.shape[1], device=states.device)
        there = point < self.counts[category][:, None]
        heads = (self.offsets[category][:, None] + point).where(there, torch.zeros_like(point))
        scores = _read(states.flatten(0, 1), self.point_heads, heads.flatten())
        return scores.view_as(there).masked_fill(~there, torch.nan)

    def mixture(self, states: Tensor, category: Tensor) -> Tensor:
        """Mix the states of a category's points to one raw score a row, [N]."""
        scores = states.new_zeros(len(states))
        with torch.autocast(states.device.type, enabled=False):
            for c, mixture in enumerate(self.mixtures):
                rows = (category == c).nonzero()[:, 0]
                # also without rows, so that every process reaches the same parameters
                mixed = mixture(states[rows, : len(self.points[self.categories[c]])].flatten(1).float())
                scores = scores.index_put((rows,), mixed[:, 0])
        return scores

    def score(self, sequences: Sequences, category: Tensor, inner: Inner) -> tuple[Tensor, Tensor | None]:
        """Return raw scores [N], and those of the points, [N, K], where `inner` has any."""
        if inner == "none":
            return self.task(sequences, category), None
        return self.score_states(self.states(sequences, category), category, inner)

    def score_states(self, states: Tensor, category: Tensor, inner: Inner) -> tuple[Tensor, Tensor]:
        """Return raw scores [N] and those of the points, [N, K], from states [N, K, H]."""
        points = self.point_scores(states, category)
        return self.mixture(states, category) if inner == "mixture" else points.nanmean(1), points

    def standardised(self, total: Tensor, category: Tensor, inner: Inner) -> Tensor:
        """Bring raw scores [N] of different categories to one scale: mean 0, spread 1 on held-out responses."""
        level = INNERS.index(inner)
        return (total - self.score_mean[level][category]) / self.score_std[level][category]

    def standardised_points(self, points: Tensor, category: Tensor) -> Tensor:
        """Do the same for the points' scores [N, K]; NaN stays NaN."""
        places = self.offsets[category][:, None] + torch.arange(points.shape[1], device=points.device)
        places = places.clamp_max(len(self.point_mean) - 1)
        return (points - self.point_mean[places]) / self.point_std[places]

    @torch.no_grad()
    def copy_heads(self) -> None:
        """Start each point's head as a copy of its category's, as phase 2 begins."""
        for c, k in enumerate(self.counts.tolist()):
            for i in range(k):
                self.point_heads[int(self.offsets[c]) + i].load_state_dict(self.task_heads[c].state_dict())

    def train_bodies(self, *, trained: bool) -> None:
        """Let the paper's bodies learn, or freeze them; a shared body never learns."""
        if self.form == "backbones":
            for name, parameter in self.bodies.named_parameters():
                if not _is_expert(name):
                    parameter.requires_grad_(trained)

    def keep_experts(self, *, categories: bool) -> None:
        """Take the gradient off the categories' experts (or the points'), which this phase must not move.

        All experts of a layer are one tensor, so `requires_grad` cannot tell them apart. An optimizer without decay and
        without momentum of earlier phases leaves an entry alone whose gradient was always zero.
        """
        if self.form == "backbones":
            return
        mask = torch.arange(len(self.body.numbers)) < len(self.categories)
        for parameter in self.experts():
            if parameter.grad is not None:
                _zero(parameter.grad, mask if categories else ~mask)

    def experts(self) -> list[nn.Parameter]:
        """All stacked adapters."""
        layers = [m for m in self.bodies.modules() if isinstance(m, ExpertLinear)]
        return [parameter for layer in layers for parameter in (layer.A, layer.B)]

    def frozen(self) -> set[str]:
        """Names of the parameters that no phase trains: the pretrained weights of the shared form."""
        if self.form == "backbones":
            return set()
        return {f"bodies.{name}" for name, _ in self.bodies.named_parameters() if not _is_expert(name)}

    @torch.no_grad()
    def set_scale(self, inner: Inner, category: int, mean: float, std: float) -> None:
        """Keep mean and spread of one category's scores; a spread of 0, one single response, is left at 1."""
        self.score_mean[INNERS.index(inner), category] = mean
        self.score_std[INNERS.index(inner), category] = std if std > 0 else 1.0

    def scaled(self, inner: Inner) -> bool:
        """Say whether mean and spread of this score were set for every category."""
        level = INNERS.index(inner)
        return bool(((self.score_mean[level] != 0) | (self.score_std[level] != 1)).all())

    def shard(self, mesh: Any, mp_policy: Any = None) -> None:
        """Shard the parameters over a device mesh by FSDP2: the body by layers, then heads and mixtures in float32.

        Raises:
            UserError: the form is "backbones", whose processes would wait for categories that others do not have.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.form == "backbones":
            raise UserError('form "backbones" cannot be sharded; expected form "shared", or a strategy such as ddp')
        self.body.shard(mesh, mp_policy)
        fully_shard(self, mesh=mesh)
        for name in ("task", "point", "states", "point_scores", "mixture", "score", "score_states"):
            register_fsdp_forward_method(self, name)

    def _states(self, sequences: Sequences, category: Tensor, point: Tensor | None) -> Tensor:
        """Return states [N, H] with the experts of the rows' categories, and of one point each where given."""
        if self.form == "shared":
            slots = [category]
            if point is not None:
                slots.append(len(self.categories) + self.offsets[category] + point)
            return self.body(sequences, torch.stack(slots, 1))
        states = torch.zeros(len(category), self.width, device=category.device)
        for c, body in enumerate(self.bodies):
            rows = (category == c).nonzero()[:, 0]
            if len(rows):
                found = body(select(sequences, rows), None if point is None else point[rows][:, None])
                states = states.index_put((rows,), found)
        return states


def select(sequences: Sequences, rows: Tensor) -> Sequences:
    """Return some rows, in the order given, possibly repeated."""
    return Sequences(sequences.ids[rows], sequences.attention_mask[rows], sequences.response_mask[rows])


def _bodies(paths: list[str], counts: list[int], options: ModelOptions, form: Form, seed: int) -> list[ExpertBody]:
    if form == "shared":
        return [ExpertBody(paths[0], options, len(counts) + sum(counts), seed=seed)]
    first = [sum(counts[:c]) for c in range(len(counts))]
    bare = replace(options, lora=None)  # of a category without points, which has no adapters
    bodies = [
        ExpertBody(paths[c], options if k else bare, range(first[c], first[c] + k), seed=seed)
        for c, k in enumerate(counts)
    ]
    for body in bodies:
        body.requires_grad_(requires_grad=True)
    return bodies


def _mixture(k: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(k * width, width), nn.PReLU(), nn.Linear(width, 1))


def _read(states: Tensor, heads: nn.ModuleList, which: Tensor) -> Tensor:
    """Apply to each state [N, H] its own head: [N], float32; all heads take part, on every process."""
    with torch.autocast(states.device.type, enabled=False):
        weights = torch.cat([head.weight for head in heads])[which]  # type: ignore[misc]
        scores = (states.float() * weights.float()).sum(-1)
        biases = [head.bias for head in heads if head.bias is not None]
        return scores + torch.cat(biases)[which].float() if biases else scores  # type: ignore[arg-type]


def _is_expert(name: str) -> bool:
    return name.endswith((".A", ".B"))


@torch.no_grad()
def _zero(gradient: Tensor, mask: Tensor) -> None:
    """Zero the entries of the first axis where the mask is True, in a possibly sharded tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    keep = (~mask).to(gradient.device, gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))
    if isinstance(gradient, DTensor):
        keep = distribute_tensor(keep, gradient.device_mesh, gradient.placements).to_local()
        gradient = gradient.to_local()
    gradient.mul_(keep)
