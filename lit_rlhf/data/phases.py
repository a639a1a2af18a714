"""Preference pairs in phases: which rows train a DMoERM's categories, its capability points, and their mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, cast

from lit_rlhf.data.base import DataModule
from lit_rlhf.data.batching import MicroBatch, ResumableLoader, StepPlanner
from lit_rlhf.data.categories import CategoryData
from lit_rlhf.data.comparisons import HELD_OUT, Item, collate_experts, point_items, weighted
from lit_rlhf.data.examples import Examples, SplitName
from lit_rlhf.data.preference import Pair, without_difference
from lit_rlhf.data.rows import PreferenceRow, PromptRow, Record, digest, preference_rows
from lit_rlhf.types import ExpertBatch, Prompt, UserError

Phase = Literal["router", "task", "capability", "mixture"]
PHASES: tuple[Phase, ...] = ("router", "task", "capability", "mixture")
EPOCHS = {"router": 1, "task": 2, "capability": 1, "mixture": 5}
NOT_TRAIN: tuple[SplitName, ...] = ("validation", "test")
ALL = "all"  # the one category of `outer: one`


class PhaseData(DataModule[PreferenceRow, Any]):
    """Pairs for the phases of a DMoERM: an epoch of the Trainer is an epoch of one phase, and phases follow each other.

    The training prompts are split once, by a hash of their text: phase 1 ("task") and the point labels of phase 2
    ("capability") come from `task_fraction` of them, phase 3 ("mixture") from the others, so that the mixture is
    fitted on prompts that its experts never saw. Point labels of validation and test prompts are never used.

    Training pairs without a listed category go to the module's router where it was given one; else, and held out, they
    are left out, counted.

    Args:
        tokenizer: see `DataModule`, as for all other arguments.
        categories: names in order; None takes those of `points`, or all that occur in the training rows, sorted.
        points: category to its capability points, in order; None takes for each category the names that occur in the
            `aspects` of its training rows, sorted.
        outer: "categories", or "one" for a single category of all rows (its points are those of all categories).
        epochs: passes by phase: router, task, capability, mixture; 0 skips a phase; those left out keep 1, 2, 1, 5.
        task_fraction: expected share of training prompts for phases 1 and 2, in (0, 1]; 0.6 in the paper.
        split_seed: of that split, apart from `seed`, so that phases run one by one agree on it.
        soft_labels: take the share of `votes` for chosen as the label of a pair, ties half; 1 without votes. At a point
            the label is that of `aspects_soft`; where there is none, `aspects` count as sure.
        options: see `DataModule`.
    """

    world_sizes: ClassVar[dict[SplitName, int]] = {"train": 8000, "validation": 1000, "test": 1000}

    def __init__(
        self,
        tokenizer: str = "builtin:policy",
        *,
        categories: list[str] | None = None,
        points: dict[str, list[str]] | None = None,
        outer: Literal["categories", "one"] = "categories",
        epochs: dict[str, int] | None = None,
        task_fraction: float = 0.6,
        split_seed: int = 0,
        soft_labels: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        if not 0 < task_fraction <= 1:
            raise UserError(f"task_fraction must be in (0, 1], got {task_fraction}")
        self.epochs: dict[str, int] = EPOCHS | (epochs or {})
        for name, count in self.epochs.items():
            if name not in PHASES or count < 0:
                raise UserError(f"epochs.{name} is {count}; expected counts >= 0 for {', '.join(PHASES)}")
        if not sum(self.epochs.values()):
            raise UserError("epochs are all 0; expected at least one phase to train")
        self._categories, self._points = categories, points
        self.outer, self.task_fraction, self.split_seed, self.soft_labels = (
            outer,
            task_fraction,
            split_seed,
            soft_labels,
        )
        self._options = options
        self._route: Callable[[list[Prompt]], list[str]] | None = None
        self.routed = 0  # rows that the router gave a category
        self.overlap = 0  # training rows whose prompt is held out

    # what the rows are

    def parse(self, record: Record) -> list[PreferenceRow]:
        """Check a preference or ranked row."""
        rows = preference_rows(record)
        return rows if self.outer == "categories" else [replace(row, category=ALL) for row in rows]

    def world_rows(self, n: int, split: SplitName) -> list[dict[str, Any]]:
        """Return noisy training pairs, or clean ones in the other splits."""
        from lit_rlhf.data.synthetic import World

        return World().preference_rows(n, split=split)

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """Names in the order of the experts."""
        if self.outer == "one":
            return (ALL,)
        named = self._categories or list(self._points or ())
        found = named or sorted({row.category for row in self._split("train") if row.category is not None})
        if not found:
            raise UserError("no training row has a `category`; expected one, or outer: one")
        return tuple(found)

    @cached_property
    def points(self) -> dict[str, tuple[str, ...]]:
        """Category to the names of its capability points, both in the order of the experts."""
        if self._points is not None and set(self._points) != set(self.categories):
            raise UserError(f"points name {sorted(self._points)}; expected the categories {list(self.categories)}")
        found: dict[str, set[str]] = {category: set() for category in self.categories}
        for row in self._route_rows("train"):
            found.get(row.category or "", set()).update(row.aspects, row.aspects_soft if self.soft_labels else ())
        if self._points is not None:
            return {category: tuple(self._points[category]) for category in self.categories}
        return {category: tuple(sorted(names)) for category, names in found.items()}

    def judge(self) -> Callable[[Pair], str | None]:
        """Drop pairs without a difference or a listed category."""

        def unusable(pair: Pair) -> str | None:
            if pair.row.category not in self.categories:
                return "no category" if pair.row.category is None else "a category that is not listed"
            return without_difference(pair)

        return unusable

    def examples(self, split: SplitName) -> Examples[PreferenceRow]:
        """Return the encoded rows of a split, see `DataModule`; of training, routed if they had no listed category."""
        if split not in self._examples:
            self._route_rows(split)
        return super().examples(split)

    def _route_rows(self, split: SplitName) -> list[PreferenceRow]:
        """Give training rows without a listed category the router's choice, once, and return all rows.

        Held-out ones are left out: a router that is measured on its own choices is always right.
        """
        rows = self._split(split)
        if split != "train":
            return rows
        lost = [i for i, row in enumerate(rows) if row.category not in self.categories]
        if self._route is not None and lost:
            for i, category in zip(lost, self._route([rows[i].prompt for i in lost]), strict=True):
                rows[i] = replace(rows[i], category=category)
            self.routed += len(lost)
        return rows

    def _split(self, split: SplitName) -> list[PreferenceRow]:
        """Return the rows of a split, those of training without any prompt that is held out elsewhere."""
        if split in self._rows:
            return self._rows[split]
        rows = super()._split(split)
        if split == "train" and not self.is_world:  # the world's splits share no prompt
            given: list[SplitName] = [other for other in NOT_TRAIN if self.sources[other]]
            held_out = {row.group for other in given for row in self._split(other)}
            self.overlap = sum(row.group in held_out for row in rows)
            rows = self._rows["train"] = [row for row in rows if row.group not in held_out]
        return rows

    # which rows a phase sees

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """The comparisons of each phase, the phases' prompts disjoint as the class says.

        Raises:
            UserError: a phase that is to train has no rows.
        """
        pairs = self.examples("train").items
        early = [digest(f"{self.split_seed}/{pair.row.group}") < self.task_fraction * 2**64 for pair in pairs]
        found = {
            "task": [Item(i, -1, self._label(pair.row)) for i, pair in enumerate(pairs) if early[i]],
            "capability": [
                item
                for i, pair in enumerate(pairs)
                if early[i]
                for item in point_items(i, pair.row, self.points[pair.row.category or ""], soft=self.soft_labels)
            ],
            "mixture": [Item(i, -1, self._label(pair.row)) for i, pair in enumerate(pairs) if not early[i]],
        }
        for phase, items in found.items():
            if not items and self.epochs[phase]:
                raise UserError(f"phase {phase!r} has no rows: expected {_WANTED[phase]}, or epochs.{phase} 0")
        groups = {phase: {pairs[item.row].row.group for item in items} for phase, items in found.items()}
        assert groups["mixture"].isdisjoint(groups["task"] | groups["capability"])
        return {phase: weighted(pairs, items) for phase, items in found.items()}

    @cached_property
    def router_data(self) -> CategoryData:
        """The prompts of the same rows, for the router's phase."""
        found = _Questions(self.tokenizer, categories=list(self.categories), **self._options)
        found.pairs = self  # no argument: those are copied, and with this one the trainer and its model
        return found

    def phase(self, epoch: int) -> Phase:
        """Return the phase of an epoch of the Trainer; the last one ever after."""
        ends = 0
        trained = [phase for phase in PHASES if self.epochs[phase]]
        for phase in trained:
            ends += self.epochs[phase]
            if epoch < ends:
                return phase
        return trained[-1]

    def first_epoch(self, phase: Phase) -> int:
        """Return the epoch of the Trainer in which a phase begins."""
        return sum(self.epochs[other] for other in PHASES[: PHASES.index(phase)])

    def phase_steps(self) -> dict[str, int]:
        """Return the optimizer steps of each phase that is trained, in order."""
        limit = getattr(self.trainer, "limit_train_batches", None)
        accumulate = getattr(self.trainer, "accumulate_grad_batches", 1)
        found: dict[str, int] = {}
        for phase in PHASES:
            if self.epochs[phase]:
                batches = len(self._loader(phase))
                batches = (
                    min(batches, limit) if isinstance(limit, int) else int(batches * (1 if limit is None else limit))
                )
                found[phase] = self.epochs[phase] * math.ceil(batches / accumulate)
        return found

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(self.phase_steps().values())

    def loader(self, split: SplitName, *, training: bool = False) -> ResumableLoader[Any]:
        """Return the training batches of the phase under way, or one pass over another split."""
        if split == "train" and training:
            return self._loader(self.phase(self.trainer.current_epoch if self.trainer else 0))
        return super().loader(split, training=training)

    def val_dataloader(self) -> ResumableLoader[Any] | list[Any]:
        """Return held-out prompts while the router trains, and held-out pairs otherwise."""
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and self.has_validation and self.phase(self.trainer.current_epoch) == "router":  # type: ignore[union-attr]
            return self._router_loader("validation")
        return super().val_dataloader()

    def batch_maker(self, items: Sequence[Pair]) -> Callable[[MicroBatch], ExpertBatch]:
        """Make `ExpertBatch`es of pairs that are not trained on."""
        whole = [Item(i, -1, self._label(pair.row)) for i, pair in enumerate(items)]
        return partial(collate_experts, self.encoder, items, whole, self.points, HELD_OUT)

    def setup(self, stage: str) -> None:
        """Read what a stage needs, rows without a listed category routed where the module can."""
        self._route = getattr(getattr(self.trainer, "lightning_module", None), "route", None)
        super().setup(stage)

    def report(self) -> list[str]:
        """Say how many comparisons each phase sees, too."""
        phases = [f"{phase} {len(self.items[phase]):,} x {self.epochs[phase]}" for phase in PHASES[1:]]
        points = [f"{category}: {', '.join(names) or 'none'}" for category, names in self.points.items()]
        counts = [f"{self.overlap:,} training rows left out, their prompts are held out"] if self.overlap else []
        counts += [f"{self.routed:,} rows without a listed category routed"] if self.routed else []
        return [*super().report(), *counts, f"comparisons by phase: {', '.join(phases)}", *points]

    def _router_loader(self, split: SplitName) -> ResumableLoader[Any]:
        self.router_data.trainer = self.trainer
        return self.router_data.loader(split, training=split == "train")

    def _label(self, row: PreferenceRow) -> float:
        return 1.0 if row.preference is None or not self.soft_labels else row.preference

    def _loader(self, phase: str) -> ResumableLoader[Any]:
        if phase == "router":
            return self._router_loader("train")
        items = self.items[phase]
        ranks = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        planner = StepPlanner(
            cast("list[int]", [item.weight for item in items]),  # the planner only adds them up
            self.batch_size,
            world_size=ranks["num_replicas"],
            rank=ranks["rank"],
            accumulate=getattr(self.trainer, "accumulate_grad_batches", 1),
            seed=self.seed,
        )
        pairs = self.examples("train").items
        make = partial(collate_experts, self.encoder, pairs, items, self.points, phase)
        return ResumableLoader(planner, make, self.num_workers)


_WANTED = {
    "task": "training prompts",
    "capability": "training pairs with `aspects`",
    "mixture": "task_fraction to leave some training prompts over",
}


class _Questions(CategoryData):
    """The prompts of a `PhaseData`, so that a router never sees one that is held out there."""

    pairs: PhaseData

    def _split(self, split: SplitName) -> list[PromptRow]:
        if self.is_world:  # it has more prompts than the pairs, and its splits share none
            return super()._split(split)
        pairs = self.pairs._split(split)  # noqa: SLF001  # one of its own
        return [_Question(row.origin, row.prompt, row.category, row) for row in pairs]


@dataclass(frozen=True)
class _Question(PromptRow):
    """The prompt of a pair, in the pair's group."""

    pair: PreferenceRow

    @property
    def group(self) -> str:
        return self.pair.group
