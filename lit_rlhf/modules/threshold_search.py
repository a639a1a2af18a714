"""Where a search for the thresholds of a run's constraints stands: plain numbers, equal on all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_rlhf.functional.nelder_mead import Evaluation, propose
from lit_rlhf.types import UserError


@dataclass(frozen=True)
class ThresholdSearch:
    """How thresholds are searched for, and what may be spent on it.

    Args:
        budget: episodes, responses of rollouts and of evaluations together; >= 1. The paper's is 256,000.
        cap: episodes of rollouts towards one point at most, >= 1; None takes an eighth of the budget, as the paper.
        tolerance: a threshold is reached within this share of its distance from the value at step 0; points that are
            closer together than this share of the first point's distance have one score. In (0, 1).
        spread: the other points of the start lie this share of the first one's distance further out, each on one axis;
            not 0, negative for nearer.
        prompts: validation prompts of an evaluation, the last ones of the probe's order, so that a probe of fewer
            prompts looks at others; >= 1.
        samples: responses to each; >= 1.
    """

    budget: int
    cap: int | None = None
    tolerance: float = 0.05
    spread: float = 0.5
    prompts: int = 100
    samples: int = 1

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        for name in ("budget", "cap", "prompts", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"search.{name} must be >= 1, got {value}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"search.tolerance must be in (0, 1), got {self.tolerance}")
        if not abs(self.spread) > self.tolerance:
            raise UserError(f"search.spread must be further from 0 than search.tolerance, got {self.spread}")

    @property
    def most(self) -> int:
        """Episodes of rollouts towards one point at most."""
        return self.cap or max(1, self.budget // 8)

    @property
    def size(self) -> int:
        """Episodes of one evaluation."""
        return self.prompts * self.samples


@dataclass
class Search:
    """Where a search stands; all of it is plain numbers, equal on all processes.

    Args:
        options: of the search.
        first: name to threshold, the first point.
        evaluations: points and their gold, oldest first.
        stood: thresholds that stand for each: the point where it was reached, else the values the policy had.
        hits: whether each was reached.
        target: the point that training heads for; None before the start.
        since: rollout episodes when it was set.
        done: the target is the best point found, for good.
    """

    options: ThresholdSearch
    first: Mapping[str, float]
    evaluations: list[Evaluation] = field(default_factory=list)
    stood: list[tuple[float, ...]] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    target: tuple[float, ...] | None = None
    since: int = 0
    done: bool = False

    def aim(self, start: Mapping[str, float], rollouts: int, update: int) -> None:
        """Choose the next point, or the best one at the end of search or budget.

        Args:
            start: name to value at step 0.
            rollouts: episodes of rollouts so far.
            update: episodes of one more.

        Raises:
            UserError: a threshold of the config is where the policy starts, so that there is no direction.
        """
        corner = list(self.first.values())
        offsets = [threshold - start[name] for name, threshold in self.first.items()]
        for name, offset in zip(self.first, offsets, strict=True):
            if offset == 0:
                raise UserError(f"constraint {name}: the search starts around threshold {self.first[name]}, which must"
                                " differ from the value at step 0")  # fmt: skip
        simplex = [corner, *(_moved(corner, i, self.options.spread * offset) for i, offset in enumerate(offsets))]
        point = propose(self.evaluations, simplex, [self.options.tolerance * abs(offset) for offset in offsets])
        self.done = point is None or self.last(rollouts, update)
        self.target, self.since = (self.best if self.done else point), rollouts

    def last(self, rollouts: int, update: int) -> bool:
        """Say whether the budget allows no more than an evaluation right now."""
        return self.spent(rollouts) + update + self.options.size > self.options.budget

    def spent(self, rollouts: int) -> int:
        """Return the episodes of rollouts and of evaluations."""
        return rollouts + len(self.evaluations) * self.options.size

    def ripe(self, rollouts: int, update: int, *, arrived: bool) -> bool:
        """Say whether the target is to be evaluated: it is reached, or its cap or the budget allows no more rollouts.

        Args:
            rollouts: episodes of rollouts so far.
            update: episodes of one more.
            arrived: whether the target is reached.
        """
        capped = rollouts - self.since >= self.options.most or self.last(rollouts, update)
        return not self.done and (arrived or capped)

    def record(self, gold: float, values: Mapping[str, float], *, arrived: bool) -> None:
        """Note what the target is worth, and name to value of the constraints there."""
        assert self.target is not None
        self.evaluations.append((self.target, gold))
        self.stood.append(self.target if arrived else tuple(values[name] for name in self.first))
        self.hits.append(arrived)

    @property
    def best(self) -> tuple[float, ...]:
        """Where gold stood highest so far, at the earlier one of equals; the first point before any.

        Rewards that move together cannot be far apart, so many points are never reached; their gold is that of the
        values the policy had in their place.
        """
        golds = [gold for _, gold in self.evaluations]
        return self.stood[golds.index(max(golds))] if golds else tuple(self.first.values())

    def named(self, point: Sequence[float]) -> dict[str, float]:
        """Return a point by the names of its axes."""
        return dict(zip(self.first, point, strict=True))

    def metrics(self, rollouts: int) -> dict[str, float]:
        """Return what is logged under `search/...`."""
        found: dict[str, float] = {
            "search/evaluations": len(self.evaluations),
            "search/episodes": self.spent(rollouts),
            "search/done": float(self.done),
        }
        if self.evaluations:
            golds = [gold for _, gold in self.evaluations]
            found |= {"search/gold": golds[-1], "search/best_gold": max(golds)}
            found |= {"search/reached": sum(self.hits) / len(self.hits)}
            found |= {f"search/best/{name}": value for name, value in self.named(self.best).items()}
        return found

    def state(self) -> dict[str, Any]:
        """Return plain numbers for a checkpoint."""
        return {
            "first": dict(self.first),
            "spread": self.options.spread,
            "evaluations": [[list(point), gold] for point, gold in self.evaluations],
            "stood": [list(point) for point in self.stood],
            "hits": list(self.hits),
            "target": None if self.target is None else list(self.target),
            "since": self.since,
            "done": self.done,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            UserError: they are of other constraints, or of a search that set out elsewhere.
        """
        theirs, own = (state["first"], state["spread"]), (dict(self.first), self.options.spread)
        if list(state["first"].items()) != list(self.first.items()) or theirs != own:
            raise UserError(
                f"the checkpoint's search set out from {theirs[0]} with search.spread {theirs[1]}, the config's from"
                f" {own[0]} with {own[1]}; expected the same thresholds and spread"
            )
        self.evaluations = [(tuple(point), float(gold)) for point, gold in state["evaluations"]]
        self.stood = [tuple(point) for point in state["stood"]]
        self.hits, self.since, self.done = list(state["hits"]), state["since"], state["done"]
        self.target = None if state["target"] is None else tuple(state["target"])


def _moved(point: Sequence[float], axis: int, by: float) -> list[float]:
    return [x + by * (i == axis) for i, x in enumerate(point)]
