"""PPO with a search for its thresholds in the same run: where gold on validation prompts is highest."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import fsum, isfinite
from typing import Any

from torch import Tensor

from lit_rlhf.functional.constrained import Constraint, reached
from lit_rlhf.modules.experience import Experience
from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.reduce import gathered, rank, world_size
from lit_rlhf.modules.threshold_search import Search, ThresholdSearch
from lit_rlhf.specs import build, plain
from lit_rlhf.types import Prompt, Rollout, Scorer, UserError

STATE = "threshold_search"  # its place in a checkpoint
FIRST_SAMPLE = 3  # of the samples' generators at update 0; scale and validation have 1 and 2


class ThresholdSearchModule(PPOModule):
    """PPO whose constraints' thresholds are searched for by Nelder-Mead while it trains (NM-PPO).

    Training heads for one point of thresholds after the other. When every constraint is reached, or the point's cap of
    episodes is spent, gold is measured on validation prompts, always the same with the same seeds of samples, and the
    next point is proposed. At the end of the search or its budget the best point becomes the target, and training goes
    on towards it until `trainer.max_steps`.

    The thresholds in the config are the first point; the others of the start lie beside it, see `ThresholdSearch`.

    Source: Moskovitz et al. 2023, arXiv:2310.04373, algorithm 1.

    Departures: gold is maximised (the listing minimises); it is measured on validation prompts (the released code takes
    the test split); the start's points are chosen and not drawn; the budget counts evaluations too. A constraint from
    one side is reached wherever it holds. The best point is where the policy stood, which is not the point proposed
    where that was out of reach. Values are those of the update's rollout, gold that of the policy after it.

    Args:
        search: the search.
        ppo_module: arguments of `PPOModule`; at least one constraint.

    Raises:
        UserError: no constraint; on start of training, no gold scorer, too few validation prompts, or too small a
            budget.
    """

    def __init__(self, search: ThresholdSearch, **ppo_module: Any) -> None:
        super().__init__(**ppo_module)
        options = build(search, ThresholdSearch)
        constraints = self.multipliers.constraints
        if not constraints:
            raise UserError("a search for thresholds needs model.constraints to name at least one")
        self.search = Search(options, {name: float(c.threshold) for name, c in constraints.items()})
        self.method = "ppo_nelder_mead"
        self._update = 0  # episodes of a full rollout, which the last of an epoch may not be
        self._gold: Scorer | None = None
        self._prompts: list[tuple[Prompt, str | None]] = []
        self.save_hyperparameters({"search": plain(options)})  # beside those of the parent

    def setup(self, stage: str) -> None:
        """Take gold scorer and validation prompts of the data.

        Raises:
            UserError: there are none, or too few, or the budget is too small.
        """
        super().setup(stage)
        if stage == "fit":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if not data.has_validation:
                raise UserError(
                    "a search for thresholds needs validation prompts; expected data.validation to name some"
                )
            self.judge_by(data.gold, data.probe_prompts(sys.maxsize))
            self._update = data.batch_size * world_size()
            least = (len(self.search.first) + 1) * (self.search.options.size + self._update)
            if self.search.options.budget < least:
                raise UserError(
                    f"search.budget is {self.search.options.budget} episodes; expected at least {least}: an update and"
                    f" an evaluation for each of {len(self.search.first) + 1} points to start with"
                )

    def judge_by(self, gold: Scorer | None, prompts: Sequence[tuple[Prompt, str | None]]) -> None:
        """Measure gold by a scorer on the last of some (prompt, category).

        Raises:
            UserError: no scorer, or fewer prompts than asked for.
        """
        count = self.search.options.prompts
        if gold is None:
            raise UserError("a search for thresholds needs a gold scorer, and the data have none; expected data.gold")
        if len(prompts) < count or count < world_size():
            raise UserError(
                f"search.prompts is {count}; expected no more than the {len(prompts)} validation prompts, and no fewer"
                f" than the {world_size()} processes"
            )
        self._gold, self._prompts = gold, list(prompts[-count:])

    def on_fit_start(self) -> None:
        """Measure the units and head for the first point, unless a checkpoint has a target."""
        super().on_fit_start()
        if self.search.target is None:
            self.aim()

    def aim(self) -> None:
        """Head for the next point."""
        self.search.aim({name: self.start(name) for name in self.search.first}, self.examples_seen, self._update)
        self._follow()

    def finish(self, experience: Experience, kl: float) -> dict[str, float]:
        """Close the update; where the target is due, evaluate it and head for the next."""
        metrics = super().finish(experience, kl)
        values = self.constraint_values(experience)
        arrived = self.arrived(values)
        if self.search.ripe(self.examples_seen, self._update, arrived=arrived):
            self.search.record(self.evaluate(), values, arrived=arrived)
            self.aim()
        return metrics | self.search.metrics(self.examples_seen)

    def arrived(self, values: Mapping[str, float]) -> bool:
        """Say whether every constraint holds within the tolerance."""
        return all(self._holds(c, values[name]) for name, c in self.multipliers.constraints.items())

    def _holds(self, constraint: Constraint, value: float) -> bool:
        start, tolerance = self.start(constraint.name), self.search.options.tolerance
        return constraint.violation(value) == 0 or reached(value, constraint.threshold, start, tolerance)

    def evaluate(self) -> float:
        """Return the policy's mean gold on the validation prompts, bit for bit the same on all processes.

        Raises:
            UserError: a score is not finite.
        """
        assert self._gold is not None
        own, found = range(rank(), len(self._prompts), world_size()), []
        prompts, categories = [self._prompts[i][0] for i in own], [self._prompts[i][1] for i in own]
        for number in range(self.search.options.samples):
            rollout = self.sampled(prompts, list(own), categories, (0, FIRST_SAMPLE + number))
            found += self._gold.score(prompts, rollout.responses, categories).total.tolist()
        golds = [gold for part in gathered(found) for gold in part]
        if not all(map(isfinite, golds)):
            raise UserError(
                f"{type(self._gold).__name__} scored a response {next(g for g in golds if not isfinite(g))}"
            )
        return fsum(golds) / len(golds)

    def probe_extras(self, rollout: Rollout, logps: Tensor, reference_logps: Tensor) -> dict[str, Any]:
        """Return the constraints as `PPOModule`, with the best threshold so far beside the one aimed at."""
        extras = super().probe_extras(rollout, logps, reference_logps)
        for name, best in self.search.named(self.search.best).items():
            extras["constraints"][name]["best_threshold"] = best
        return extras

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the search."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE] = self.search.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where it stood."""
        super().on_load_checkpoint(checkpoint)
        self.search.load(checkpoint[STATE])
        if self.search.target is not None:
            self._follow()

    def _follow(self) -> None:
        assert self.search.target is not None
        self.multipliers.set_thresholds(self.search.named(self.search.target))
