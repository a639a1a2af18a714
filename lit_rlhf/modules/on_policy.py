"""What methods share that learn from their own samples: reward models, their units, and how samples are drawn."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from lit_rlhf.functional.sequence import row_generator
from lit_rlhf.models.scorers import HFRewardModel
from lit_rlhf.modules.experience import joined
from lit_rlhf.modules.minibatches import passes
from lit_rlhf.modules.objective import NegativeKL, Objective, WeightedReward
from lit_rlhf.modules.policy import PolicyModule
from lit_rlhf.modules.reduce import gathered, rank, world_size
from lit_rlhf.modules.scale import RewardScale
from lit_rlhf.specs import build, build_optional
from lit_rlhf.types import Prompt, Rollout, Sampling, Scorer, Scores, UserError

KL = "kl"  # the stream of log-ratios, which a constraint may name like a reward


class OnPolicyModule(PolicyModule):
    """A policy that is rewarded for what it samples.

    Every row is drawn from a generator of its own and scored by each reward model; all processes run equally many
    passes, whatever their rows, so that sharded models never wait for one another.

    Args:
        rewards: name to scorer; None takes the data's own reward model, under the name "proxy".
        objective: makes one score of all rewards; their sum when left out.
        sampling: how responses are drawn.
        units: "standardised" by mean and spread on the reference policy's samples, measured once before training, or
            "raw".
        scale_samples: responses on which they are measured, one to each of the first training prompts.
        rollout_batch_size: rows sampled at once; None samples all.
        seed: of samples; None takes the run's.
        base: arguments of `PolicyModule` and `BaseModule`.

    Raises:
        UserError: names that rewards cannot have, or that the objective gives and no reward has.
    """

    def __init__(
        self,
        rewards: dict[str, Scorer] | None = None,
        objective: Objective | None = None,
        *,
        sampling: Sampling | None = None,
        units: Literal["standardised", "raw"] = "standardised",
        scale_samples: int = 256,
        rollout_batch_size: int | None = None,
        seed: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.rewards = {name: build(scorer, Scorer) for name, scorer in (rewards or {}).items()}
        self.objective = build_optional(objective, Objective) or WeightedReward()
        self.sampling = build_optional(sampling, Sampling) or Sampling()
        self.scale_samples, self.rollout_batch_size, self.seed = scale_samples, rollout_batch_size, seed
        self.reward_names = list(self.rewards) or ["proxy"]
        if KL in self.reward_names or any("." in name or not name for name in self.reward_names):
            raise UserError(f"rewards need names without dots, and not {KL!r}, got {self.reward_names}")
        self.objective.check(self.reward_names)
        self.scale = RewardScale(self.reward_names, units)

    @property
    @abstractmethod
    def updates(self) -> int:
        """Rollouts that were learnt from, also before an interruption; it seeds the samples."""

    def build_models(self) -> None:
        """Load policy and reference, and give scorers that share the policy's base their adapters."""
        super().build_models()
        assert self.policy is not None
        for scorer in _all_scorers([*self.rewards.values(), self.proxy_scorer]):
            if hasattr(scorer, "attach"):
                scorer.attach(self.policy)

    def setup(self, stage: str) -> None:
        """Take the data's encoder and reward model.

        Raises:
            UserError: there is no reward model.
        """
        super().setup(stage)
        self.default_reward()

    def default_reward(self) -> None:
        """Take the data's own reward model where the config names none.

        Raises:
            UserError: the data have none either.
        """
        if not self.rewards:
            path = self._data_proxy()
            if path is None:
                raise UserError("model.rewards names no reward model, and the data bring none; expected name: scorer")
            self.rewards = {"proxy": HFRewardModel(path)}

    def on_fit_start(self) -> None:
        """Measure what the rewards are worth on the reference policy's samples, unless a checkpoint knows it."""
        if not self.scale.measured:
            examples = self.trainer.datamodule.examples("train").items[: self.scale_samples]  # type: ignore[attr-defined]
            self.measure_scale([e.row.prompt for e in examples], [e.row.category for e in examples])

    def measure_scale(self, prompts: Sequence[Prompt], categories: Sequence[str | None] | None = None) -> None:
        """Sample the policy as it is, the same prompts on all processes, and keep mean and spread of every reward.

        Raises:
            UserError: a process is left without a prompt.
        """
        if len(prompts) < world_size():
            raise UserError(
                f"{len(prompts)} prompts to measure the rewards' scale on {world_size()} processes; expected one each:"
                " raise ppo.scale_samples or give more training prompts"
            )
        own = range(rank(), len(prompts), world_size())
        kinds = None if categories is None else [categories[i] for i in own]
        rollout = self.sampled([prompts[i] for i in own], list(own), kinds, (0, 1))
        self.scale.measure({name: scores.total for name, scores in self.score(rollout).items()})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell callbacks that have `on_phase(trainer, module, name)` what begins: sampling, scoring or optimising."""
        for callback in [] if self._trainer is None else self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_phase"):
                callback.on_phase(self.trainer, self, name)
        yield

    def score(self, rollout: Rollout) -> dict[str, Scores]:
        """Score the responses by every reward model, name to [B]; all processes score equally many rows."""
        count = len(rollout.prompts)
        rows = [*range(count), *([0] * (self.most(count) - count))]
        prompts, texts = [rollout.prompts[i] for i in rows], [rollout.responses[i] for i in rows]
        categories = None if rollout.categories is None else [rollout.categories[i] for i in rows]
        self.default_reward()
        found = {}
        for name, scorer in self.rewards.items():
            scores = scorer.score(prompts, texts, categories)
            members = None if scores.members is None else scores.members[:count].to(self.device)
            found[name] = Scores(scores.total[:count].to(self.device).float(), members)
            if not found[name].total.isfinite().all():
                row = int((~found[name].total.isfinite()).nonzero()[0])
                raise UserError(f"reward {name!r} scored {rollout.responses[row]!r} {float(found[name].total[row])}")
        return found

    @property
    def run_seed(self) -> int:
        """The seed of samples and minibatches."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def sampled(
        self, prompts: list[Prompt], numbers: list[int], categories: list[str | None] | None, draw: tuple[int, int]
    ) -> Rollout:
        """Sample in as many passes as the process with most rows needs; `draw` is (update, sample number)."""
        update, sample = draw
        parts = []
        for part in passes(range(len(prompts)), self.most(len(prompts)), self.rollout_batch_size):
            generators = [row_generator(self.run_seed, update, numbers[i], sample) for i in part.rows]
            rollout = self.sample([prompts[i] for i in part.rows], generators, self.sampling)
            kinds = None if categories is None else [categories[i] for i in part.rows]
            parts += [replace(rollout, categories=kinds)] if part.counts else []
        return joined(parts)

    def most(self, count: int) -> int:
        """Return the rows of the process that has most."""
        return max(gathered(count))

    def proxy(self, rollout: Rollout) -> Scores | None:
        """Score samples as the policy is rewarded.

        One reward's scores are given raw, with its members. Several are combined by the objective in the run's units
        (their mean where the objective reads none), with the raw scores by name as parts.
        """
        if self.proxy_scorer is not None:
            return super().proxy(rollout)
        self.default_reward()
        if len(self.rewards) == 1:
            (scorer,) = self.rewards.values()
            return scorer.score(rollout.prompts, rollout.responses, rollout.categories)
        raw = {name: found.total for name, found in self.score(rollout).items()}
        units = {name: self.scale.to_units(name, x) for name, x in raw.items()}
        reads_none = isinstance(self.objective, NegativeKL)
        total = torch.stack(list(units.values())).mean(0) if reads_none else self.objective.combine(units)
        return Scores(total.cpu(), parts={name: x.cpu() for name, x in raw.items()})


def _all_scorers(scorers: Sequence[Scorer | None]) -> Iterator[Scorer]:
    """Yield scorers and those inside them."""
    for scorer in scorers:
        if scorer is not None:
            yield scorer
            yield from _all_scorers(getattr(scorer, "scorers", []))
