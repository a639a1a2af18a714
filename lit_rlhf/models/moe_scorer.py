"""A DMoERM at work: routed scores, their parts by capability point, and why one response scored higher than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.encoding import Encoded, Encoder
from lit_rlhf.functional.aggregation import RewardAggregator
from lit_rlhf.models.loading import ModelOptions
from lit_rlhf.models.moe import Inner, MoE
from lit_rlhf.models.moe_folders import read_description, read_moe, scaled
from lit_rlhf.models.router import Router
from lit_rlhf.types import Prompt, Scorer, Scores, UserError

Routing = Literal["router", "oracle", "soft"]
SPREAD = "spread"  # the part beside those of the points


@dataclass(frozen=True)
class MoEScores:
    """Scores of B responses with everything that led to them.

    Args:
        total: [B], on one scale for all categories.
        gate: [B, C], weight of each category; rows sum to one.
        points: [B, K], the points of the weightiest category, standardised; NaN beyond its own. None without points.
    """

    total: Tensor
    gate: Tensor
    points: Tensor | None


def gate_of(
    probabilities: Tensor | None, listed: Sequence[str | None], categories: Sequence[str], routing: Routing
) -> Tensor:
    """Return the weight of each category for each row, [B, C].

    "router": 1 for the most probable category. "soft": the two most probable ones by their probabilities. "oracle": 1
    for the listed category, and the router's choice where none of `categories` is listed.

    Args:
        probabilities: [B, C]; None where there is no router.
        listed: B categories that the rows bring along.
        categories: C names.
        routing: which rule.

    Raises:
        UserError: a row can neither be routed nor looked up.
    """
    if len(categories) == 1:
        return torch.ones(len(listed), 1)
    order = {name: number for number, name in enumerate(categories)}
    if probabilities is None and (routing != "oracle" or not all(name in order for name in listed)):
        odd = next((name for name in listed if name not in order), None)
        raise UserError(
            f"without a router a row needs one of the categories {', '.join(categories)}, and routing: oracle;"
            f" got category {odd!r} and routing: {routing}"
        )
    if routing == "soft":
        assert probabilities is not None
        top = probabilities.topk(2, -1)
        return torch.zeros_like(probabilities).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    choice = [-1] * len(listed) if probabilities is None else probabilities.argmax(-1).tolist()
    numbers = [
        order.get(name or "", routed) if routing == "oracle" else routed
        for name, routed in zip(listed, choice, strict=True)
    ]
    return torch.nn.functional.one_hot(torch.tensor(numbers), len(categories)).float()


def gated_logit(margins: Tensor, gate: Tensor) -> Tensor:
    """Return the logit of the gate's mean probability that `chosen` is the better one.

    p = sum_c gate_c sigmoid(margin_c),    logit = log p - log(1 - p)

    Args:
        margins: [B, C], raw scores of chosen less rejected by each category's experts: its own logit.
        gate: [B, C], weight of each category; rows sum to one.

    Returns:
        [B]; the margin itself where one category has all the weight.
    """
    weight = gate.log()
    return (weight + logsigmoid(margins)).logsumexp(1) - (weight + logsigmoid(-margins)).logsumexp(1)


@torch.no_grad()
def score_rows(
    moe: MoE,
    encoder: Encoder,
    rows: Sequence[Encoded],
    gate: Tensor,
    inner: Inner,
    aggregator: RewardAggregator | None = None,
    *,
    batch_size: int = 64,
) -> MoEScores:
    """Score encoded rows by the categories that the gate names, in batches of like length.

    total = sum_c gate_c z_c,    z_c = (score_c - mean_c) / std_c

    Args:
        moe: in eval mode.
        encoder: pads the rows.
        rows: B prompts with responses.
        gate: [B, C].
        inner: which score of a category counts.
        aggregator: makes z_c of the category's standardised points, in place of `inner`'s score.
        batch_size: rows of one forward pass.
    """
    places = gate.nonzero()
    order = sorted(range(len(places)), key=lambda i: len(rows[int(places[i, 0])].ids))
    device = moe.score_mean.device
    width = int(moe.counts.max())
    total = torch.zeros(len(rows))
    points = torch.full((len(rows), width), torch.nan)
    best = gate.argmax(-1)
    for start in range(0, len(order), batch_size):
        batch = places[order[start : start + batch_size]]
        category = batch[:, 1].to(device)
        sequences = encoder.collate([rows[i] for i in batch[:, 0].tolist()]).to(device)
        raw, parts = moe.score(sequences, category, inner)
        score = moe.standardised(raw, category, inner)
        if parts is not None:
            parts = moe.standardised_points(parts, category)
            score = score if aggregator is None else _aggregated(parts, moe.counts[category], aggregator)
            first = batch[:, 1] == best[batch[:, 0]]
            points[batch[first, 0]] = parts.cpu()[first]
        total.index_add_(0, batch[:, 0], gate[batch[:, 0], batch[:, 1]] * score.cpu())
    return MoEScores(total, gate, None if inner == "none" else points)


def named_parts(scores: MoEScores, points: dict[str, tuple[str, ...]]) -> Scores:
    """Name the points: parts by point, NaN where the row's category has no such point, and their spread.

    `members` holds the points in the order of the category, where all categories have equally many.
    """
    if scores.points is None:
        return Scores(scores.total)
    names = list(points)
    categories = [names[c] for c in scores.gate.argmax(-1).tolist()]
    parts = {name: torch.full_like(scores.total, torch.nan) for group in points.values() for name in group}
    for row, category in enumerate(categories):
        for k, name in enumerate(points[category]):
            parts[name][row] = scores.points[row, k]
    there = ~scores.points.isnan()
    mean = scores.points.nanmean(-1, keepdim=True)
    spread = ((scores.points - mean).square().nansum(-1) / there.sum(-1)).sqrt()
    equal = len({len(group) for group in points.values()}) == 1
    return Scores(scores.total, scores.points if equal else None, parts | {SPREAD: spread})


class MoERewardModel(Scorer):
    """A DMoERM folder as a scorer: each prompt is routed to the experts of its category.

    Args:
        path: folder that `RewardMoEModule` exported.
        routing: "router" (most probable category), "soft" (the two most probable ones, by probability) or "oracle"
            (the row's own category where it is listed, else the router's choice).
        aggregator: makes the score of the points, each standardised, in place of the folder's mixture: UWO or the worst
            case over capability points.
        router: a router folder or hub id in place of the folder's own.
        batch_size: rows in one forward pass; >= 1.
        joiner: text between a string prompt and its response; None takes the folder's.
        max_length: window in tokens; None takes the folder's.
        device: None takes the current GPU where there is one, else the CPU.
        dtype: of the body; experts, heads and mixtures work in float32 in any case.

    Raises:
        UserError: no such folder, a routing that it has no router for, or soft routing over scores without a scale.
    """

    def __init__(  # noqa: PLR0913  # flat keys in a config
        self,
        path: str,
        routing: Routing = "router",
        aggregator: RewardAggregator | None = None,
        *,
        router: str | None = None,
        batch_size: int = 64,
        joiner: str | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"MoERewardModel: batch_size must be >= 1, got {batch_size}")
        self.path, self.routing, self.aggregator, self.router = path, routing, aggregator, router
        self.batch_size, self.joiner, self.max_length = batch_size, joiner, max_length
        self.device, self.dtype = device, dtype
        self.description = read_description(path)
        own = self.description["router"]
        found = router or (str(Path(path) / own) if own else None)
        window = max_length or self.description.get("max_length")
        self._router = None if found is None else Router(found, batch_size, max_length=window, device=device)
        if routing == "soft" and aggregator is None and not scaled(self.description):
            raise UserError(
                f"{path}: its categories' scores were never brought to one scale, for which a `fit` needs validation"
                " rows of each; expected such a folder, or routing: router"
            )
        if self._router is None and routing != "oracle" and len(self.description["categories"]) > 1:
            raise UserError(f"{path} holds no router; expected router: FOLDER, or routing: oracle")
        if aggregator is not None and self.description["inner"] == "none":
            raise UserError(f"{path} has no capability points for an aggregator (its `inner` is none)")
        self._loaded: tuple[MoE, Encoder] | None = None

    @property
    def points(self) -> dict[str, tuple[str, ...]]:
        """Category to its capability points."""
        return {c["name"]: tuple(point["name"] for point in c["points"]) for c in self.description["categories"]}

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> Scores:
        """Score each response; `parts` holds its points and their spread. Categories are read by oracle routing alone.

        Raises:
            UserError: a prompt fills the window alone, or an unlisted category meets no router.
        """
        return named_parts(self.details(prompts, responses, categories), self.points)

    def details(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> MoEScores:
        """Score each response, with the gate and all points."""
        moe, encoder = self._load()
        rows = encoded_rows(encoder, prompts, responses)
        gate = self._gate(prompts, categories or [None] * len(prompts))
        return score_rows(
            moe, encoder, rows, gate, self.description["inner"], self.aggregator, batch_size=self.batch_size
        )

    def _gate(self, prompts: Sequence[Prompt], categories: Sequence[str | None]) -> Tensor:
        names = list(self.points)
        probabilities = None
        if self._router is not None and len(names) > 1:
            if set(self._router.categories) != set(names):
                raise UserError(f"{self._router.path} routes to {self._router.categories}; {self.path} has {names}")
            probabilities = self._router.probabilities(prompts)
            probabilities = probabilities[:, [self._router.categories.index(name) for name in names]]
        return gate_of(probabilities, categories, names, self.routing)

    def _load(self) -> tuple[MoE, Encoder]:
        if self._loaded is None:
            described = self.description
            joiner = described.get("joiner", " ") if self.joiner is None else self.joiner
            window = self.max_length or described.get("max_length")
            encoder = Encoder.from_pretrained(self.path, joiner=joiner, max_length=window)
            encoder.stop_ids = tuple(described.get("stop_ids", encoder.stop_ids))
            encoder.pad_id = encoder.eos_id  # the folder's padding token may have no embedding; masks hide any
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            moe = read_moe(self.path, ModelOptions(dtype=self.dtype))
            self._loaded = moe.requires_grad_(requires_grad=False).eval().to(device), encoder
        return self._loaded


def encoded_rows(encoder: Encoder, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Encoded]:
    """Encode prompts with their responses.

    Raises:
        UserError: a prompt fills the window alone.
    """
    rows = []
    for number, row in enumerate(encoder.encode_many(prompts, responses), 1):
        if row is None:
            raise UserError(f"row {number}: its prompt fills the model's window of {encoder.max_length} tokens")
        rows.append(row)
    return rows


def explain(scores: MoEScores, points: dict[str, tuple[str, ...]], row: int, other: int) -> str:
    """Say why response `row` scored higher than response `other` to the same prompt, or lower, as a table to read.

    Each line is a capability point with both standardised scores and their difference, the largest first; the last
    lines give the spread over points and the totals.
    """
    category = list(points)[int(scores.gate[row].argmax())]
    share = scores.gate[row].max().item()
    first, second = scores.total[row].item(), scores.total[other].item()
    verdict = "higher" if first > second else "lower" if first < second else "the same"
    lines = [f"category {category}" + (f" (weight {share:.2f})" if share < 1 else "")]
    lines += [f"the first response scored {verdict}: {first:+.2f} against {second:+.2f}"]
    names = points[category] if scores.points is not None else ()
    width = max(map(len, (*names, SPREAD, "total")))
    lines += [f"{'point':<{width}}  {'first':>7}  {'second':>7}  {'difference':>10}"]
    if scores.points is not None:
        left, right = (scores.points[i, : len(names)] for i in (row, other))
        for k in (left - right).abs().argsort(descending=True).tolist():
            lines.append(_line(names[k], left[k].item(), right[k].item(), width))
        lines.append(_line(SPREAD, left.std(correction=0).item(), right.std(correction=0).item(), width))
    return "\n".join([*lines, _line("total", first, second, width)])


def _line(name: str, first: float, second: float, width: int) -> str:
    return f"{name:<{width}}  {first:>+7.2f}  {second:>+7.2f}  {first - second:>+10.2f}"


def _aggregated(points: Tensor, counts: Tensor, aggregator: RewardAggregator) -> Tensor:
    """Aggregate rows [N, K] of which only the first `counts` entries count, equal counts at a time."""
    out = points.new_zeros(len(points))
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        out[rows] = aggregator(points[rows, :count])
    return out
