"""Proximal policy optimisation against any number of reward models, each free, weighed, or held at a threshold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.functional.constrained import AtLeast, AtMost, Constraint, Equal
from lit_rlhf.functional.control import FixedKL, KLController
from lit_rlhf.functional.policy_gradient import gae, kl_estimates
from lit_rlhf.functional.sequence import masked_mean, masked_moments, row_generator, standardise
from lit_rlhf.functional.shaping import kl_rewards, penalise_unended, terminal_rewards
from lit_rlhf.models.critic import CRITIC, Critic
from lit_rlhf.models.scorers import HFRewardModel
from lit_rlhf.modules.experience import Experience, joined, trimmed
from lit_rlhf.modules.minibatches import RowTable, passes
from lit_rlhf.modules.multipliers import Dual, Kept, Multipliers
from lit_rlhf.modules.objective import NegativeKL, Objective, Satisficing, WeightedReward
from lit_rlhf.modules.optimizer import planned_steps
from lit_rlhf.modules.policy import PolicyModule
from lit_rlhf.modules.ppo_options import CriticOptions, PPOOptions
from lit_rlhf.modules.ppo_update import Totals, clip_gradients, micro_losses
from lit_rlhf.modules.reduce import gathered, means, rank, summed, world_size
from lit_rlhf.modules.scale import RewardScale
from lit_rlhf.specs import build, build_optional
from lit_rlhf.types import Prompt, Rollout, Sampling, Scorer, Scores, SequenceBatch, Sequences, Share, UserError

KL = "kl"  # the stream of log-ratios, which a constraint may name like a reward
SUSPICIOUS = 5  # updates in a row with a negative mean KL, after which it is no chance


class PPOModule(PolicyModule):
    """Trains a policy by PPO on its own samples, each training step one update in named phases.

    rollout -> score -> advantages -> update_policy -> update_multipliers

    Streams are kept apart to the end, the task's first, then one for each constraint, each with its own value head. The
    task's stream is the objective's score on the last token less the KL coefficient times each token's log-ratio.

    `trainer.max_steps`, the probe and checkpoints count optimizer steps, `ppo.epochs` x `ppo.minibatches` an update;
    the learning rate moves once an update.

    Args:
        rewards: name to scorer; None takes the data's own reward model, under the name "proxy".
        objective: the task; the sum of all rewards when left out.
        constraints: on the mean of a reward, or of "kl" (nats a response), in the run's units.
        dual: how the multipliers of the constraints move.
        ppo: the update.
        kl: weight of the KL penalty; none when left out.
        critic: who estimates the values.
        sampling: how responses are drawn.
        units: of rewards, thresholds and constraint values: "standardised" by mean and spread on the reference
            policy's samples, measured once before training, or "raw".
        clip_scores: bound of scores in the run's units as the policy is rewarded with them; constraints are measured
            without. None does not clip, since clipping hides over-optimisation.
        seed: of samples and minibatches; None takes the run's.
        base: arguments of `PolicyModule` and `BaseModule`.

    Raises:
        UserError: names that are no rewards, or options that do not go together.
    """

    def __init__(  # noqa: PLR0913 - one argument for each block of the config
        self,
        rewards: dict[str, Scorer] | None = None,
        objective: Objective | None = None,
        constraints: list[Constraint] | None = None,
        *,
        dual: Dual | None = None,
        ppo: PPOOptions | None = None,
        kl: KLController | None = None,
        critic: CriticOptions | None = None,
        sampling: Sampling | None = None,
        units: Literal["standardised", "raw"] = "standardised",
        clip_scores: float | None = None,
        seed: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.automatic_optimization = False
        self.rewards = {name: build(scorer, Scorer) for name, scorer in (rewards or {}).items()}
        self.objective = build_optional(objective, Objective) or WeightedReward()
        kept = [build(constraint, Constraint) for constraint in constraints or []]
        self.dual = build_optional(dual, Dual) or Dual()
        self.ppo = build_optional(ppo, PPOOptions) or PPOOptions()
        self.kl = build_optional(kl, KLController) or FixedKL(0.0)
        self.critic_options = build_optional(critic, CriticOptions) or CriticOptions()
        self.sampling = build_optional(sampling, Sampling) or Sampling()
        self.clip_scores, self.seed = clip_scores, seed
        self.reward_names = list(self.rewards) or ["proxy"]
        self._check(kept)
        self.multipliers = Multipliers(kept, self.dual)
        self.scale = RewardScale(self.reward_names, units)
        self.progress = Progress(self.kl.coefficient)
        self.critic: Critic | None = None
        self.share: Share | None = None
        self._below_zero = 0
        self.method = _method(self.objective, kept, self.dual)
        self.keep_hyper_parameters(
            rewards=self.rewards or None, objective=self.objective, constraints=kept or None, dual=self.dual,
            ppo=self.ppo, kl=self.kl, critic=self.critic_options, sampling=self.sampling, units=units,
            clip_scores=clip_scores, seed=seed, proxy=self.proxy_scorer,
        )  # fmt: skip

    def _check(self, constraints: Sequence[Constraint]) -> None:
        names = self.reward_names
        if KL in names or any("." in name or not name for name in names):
            raise UserError(f"rewards need names without dots, and not {KL!r}, got {names}")
        self.objective.check(names)
        for constraint in constraints:
            if constraint.name not in (*names, KL):
                raise UserError(f"a constraint names {constraint.name!r}; expected one of {', '.join((*names, KL))}")
        if isinstance(self.objective, NegativeKL) and not self.kl.coefficient > 0:
            raise UserError("objective NegativeKL needs kl.coefficient > 0: there is nothing else in the task")
        if self.clip_scores is not None and not self.clip_scores > 0:
            raise UserError(f"clip_scores must be > 0, got {self.clip_scores}")

    # models, optimizer, start

    def build_models(self) -> None:
        """Load policy, reference and critic, and give scorers that share the policy's base their adapters."""
        super().build_models()
        assert self.policy is not None
        for scorer in _all_scorers([*self.rewards.values(), self.proxy_scorer]):
            if hasattr(scorer, "attach"):
                scorer.attach(self.policy)
        wanted = self.critic_options
        lora = wanted.lora or (self.options.lora if wanted.form == "lora" else None)
        self.critic = Critic(
            self.policy,
            path=wanted.path or self.model_name_or_path,
            options=replace(self.options, lora=lora),
            streams=1 + len(self.multipliers),
            form=wanted.form,
        )

    def backbones(self) -> list[Any]:
        """Return the loaded models."""
        return [*super().backbones(), *([] if self.critic is None else [self.critic])]

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that one batch of prompts leads to."""
        return self.ppo.steps

    @property
    def updates(self) -> int:
        """Rollouts that were learnt from, also before an interruption."""
        return int(self.progress.updates)

    @property
    def examples_seen(self) -> int:
        """Responses that were learnt from, on all processes."""
        return int(self.progress.examples)

    def configure_optimizers(self) -> Any:
        """Return one optimizer with a group for the policy and one for the critic, and a schedule over the updates."""
        optimizer = self.optimizer_options.build(self.parameter_groups())
        updates = -(-planned_steps(self.trainer) // self.ppo.steps)
        return [optimizer], [self.optimizer_options.schedule_for(optimizer, updates)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters of the policy, and those that are the critic's alone with their rate."""
        assert self.policy is not None
        own = [p for name, p in self.policy.named_parameters() if p.requires_grad and f".{CRITIC}." not in name]
        known = {id(p) for p in own}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        rate = {} if self.critic_options.lr is None else {"lr": self.critic_options.lr}
        return [{"params": own}, {"params": others} | rate]

    def setup(self, stage: str) -> None:
        """Take the data's encoder and reward model, and look whether a rollout can be cut as asked for.

        Raises:
            UserError: there is no reward model, or a rollout has fewer rows than minibatches.
        """
        super().setup(stage)
        self.default_reward()
        rows = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if stage == "fit" and rows is not None and rows * self.trainer.world_size < self.ppo.minibatches:
            raise UserError(
                f"data.batch_size {rows} on {self.trainer.world_size} processes gives fewer rows an update than"
                f" ppo.minibatches, {self.ppo.minibatches}"
            )

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
            examples = self.trainer.datamodule.examples("train").items[: self.ppo.scale_samples]  # type: ignore[attr-defined]
            self.measure_scale([e.row.prompt for e in examples], [e.row.category for e in examples])

    def measure_scale(self, prompts: Sequence[Prompt], categories: Sequence[str | None] | None = None) -> None:
        """Sample the policy as it is, the same prompts on all processes, and keep mean and spread of every reward."""
        own = range(rank(), len(prompts), world_size())
        kinds = None if categories is None else [categories[i] for i in own]
        rollout = self._sampled([prompts[i] for i in own], list(own), kinds, (0, 1))
        self.scale.measure({name: scores.total for name, scores in self.score(rollout).items()})

    # one update

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Sample, score, learn: one update."""
        with self.phase("sampling"):
            rollout = self.rollout(batch)
        with self.phase("scoring"):
            scores = self.score(rollout)
            experience, metrics = self.advantages(batch.index, rollout, scores)
        with self.phase("optimising"):
            metrics |= self.update_policy(experience, self.optimizers(), getattr(batch, "sft", None))
            metrics |= self.update_multipliers(experience)
            metrics |= self.finish(experience, metrics["objective/kl"])
            self.lr_schedulers().step()  # type: ignore[union-attr]
        # Lightning counts batches; the step that the probe and checkpoints go by is the optimizer's
        self.log("loss", metrics.pop("loss"), prog_bar=True, batch_size=1)
        self.log_dict(metrics | {"step": float(self.trainer.global_step)}, batch_size=1)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell callbacks that have `on_phase(trainer, module, name)` what begins: sampling, scoring or optimising."""
        for callback in [] if self._trainer is None else self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_phase"):
                callback.on_phase(self.trainer, self, name)
        yield

    def rollout(self, batch: Any) -> Rollout:
        """Draw one response to every prompt of a `PromptBatch`, each row from a generator of its own."""
        return self._sampled(list(batch.prompts), batch.index.tolist(), list(batch.categories), (self.updates, 0))

    def score(self, rollout: Rollout) -> dict[str, Scores]:
        """Score the responses by every reward model, name to [B]; all processes score equally many rows."""
        count = len(rollout.prompts)
        rows = [*range(count), *([0] * (self._most(count) - count))]
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

    @torch.no_grad()
    def advantages(
        self, index: Tensor, rollout: Rollout, scores: Mapping[str, Scores]
    ) -> tuple[Experience, dict[str, float]]:
        """Turn scores into advantages of every stream, standardised over all processes.

        Args:
            index: [B], row numbers in the data set.
            rollout: B responses.
            scores: of `score`.

        Returns:
            What to learn from, and means over all processes to log.
        """
        mask, logps = rollout.response_mask, rollout.token_logps
        reference, values = self._judged(rollout)
        units = {name: self.scale.to_units(name, found.total) for name, found in scores.items()}
        clipped = {name: x if self.clip_scores is None else _clip(x, self.clip_scores) for name, x in units.items()}
        rewards = self._streams(clipped, rollout, reference)
        raw, targets = gae(rewards, values, mask, self.ppo.gamma, self.ppo.gae_lambda)
        kl = kl_estimates(logps, reference, mask)
        episode = [kl["k1"] if name == KL else units[name] for name in self.multipliers.constraints]
        experience = Experience(
            index=index.to(self.device),
            sequences=rollout.sequences,
            behaviour_logps=logps,
            values=values,
            advantages=self._standardised(raw, rewards, mask),
            targets=targets,
            constraint_values=torch.stack([x.float() for x in episode], -1) if episode else kl["k1"][:, None][:, :0],
        )
        task = self.objective.combine(clipped)
        columns = {
            "objective/kl": kl["k1"],
            "objective/kl_k3": kl["k3"],
            "objective/scores": task,
            "objective/rlhf_reward": rewards[..., 0].sum(-1),
            "objective/entropy": -logps.sum(-1),
            "objective/length": mask.sum(-1),
            "objective/ended": rollout.ended,
            "policy/sampler_mismatch": masked_mean((rollout.sampler_logps - logps).abs(), mask),
        }
        for name, found in scores.items():
            columns |= {f"objective/scores/{name}/raw": found.total, f"objective/scores/{name}/normalised": units[name]}
            columns |= {f"objective/scores/{name}/clipped": clipped[name]}
            if found.members is not None:
                columns[f"objective/scores/{name}/members_std"] = found.members.std(-1, correction=0)
        return experience, means(columns)

    def update_policy(
        self, experience: Experience, optimizer: Any, demonstrations: SequenceBatch | None = None
    ) -> dict[str, float]:
        """Take the optimizer's steps on one rollout.

        Args:
            experience: of `advantages`.
            optimizer: over `parameter_groups`.
            demonstrations: as many rows as the experience has, for the loss weighed by `ppo.ptx_coefficient`.

        Returns:
            Means over all tokens of all steps and processes, to log.

        Raises:
            UserError: a loss is not finite.
        """
        if self.ppo.ptx_coefficient and demonstrations is None:
            raise UserError("ppo.ptx_coefficient > 0 needs demonstrations; expected data.sft to name some")
        demonstrations = demonstrations if self.ppo.ptx_coefficient else None
        extra = None if demonstrations is None else demonstrations.sequences.response_lengths
        table = RowTable.gather(experience.index, experience.mask.sum(-1), extra)
        self.share = Share(*(torch.tensor(x / world_size()) for x in (len(table.rows), table.tokens)))
        totals, advantages = Totals(), self.mixed(experience)
        for epoch in range(self.ppo.epochs):
            order = (self.run_seed, self.updates, epoch)
            for minibatch in table.minibatches(order, self.ppo.minibatches, self.ppo.micro_batch_size):
                optimizer.zero_grad()
                sums = torch.zeros_like(totals.sums, device=self.device)
                for part in minibatch.passes:
                    demo = None if demonstrations is None else _rows_of(demonstrations.sequences, part.rows)
                    loss, found = micro_losses(
                        self, experience.rows(part.rows), advantages[list(part.rows)], demo, minibatch
                    )
                    self._backward(loss * (world_size() * part.counts))
                    sums += found * part.counts
                if not totals.add(summed(sums), minibatch, self.ppo.stop_at_kl, self.updates):
                    optimizer.zero_grad()
                    return totals.metrics()
                totals.norm(clip_gradients(optimizer, self.ppo.max_grad_norm))
                optimizer.step()
                if self.dual.every == "minibatch":
                    own = [row for part in minibatch.passes if part.counts for row in part.rows]
                    self.multipliers.update(self.constraint_values(experience, own))
                    advantages = self.mixed(experience)
        optimizer.zero_grad()
        return totals.metrics()

    def update_multipliers(self, experience: Experience) -> dict[str, float]:
        """Step the multipliers on the means of all episodes of all processes; return what to log."""
        if self.dual.every == "rollout":
            self.multipliers.update(self.constraint_values(experience))
        return self.multipliers.metrics()

    def finish(self, experience: Experience, kl: float) -> dict[str, float]:
        """Count the update and let the KL coefficient follow; return what to log.

        Args:
            experience: that was learnt from.
            kl: nats a response, mean over all processes.
        """
        used = float(self.progress.kl_coefficient)
        self.progress.kl_coefficient.fill_(self.kl.next(used, kl))
        self.progress.updates += 1
        self.progress.examples += sum(gathered(len(experience.index)))
        self._below_zero = self._below_zero + 1 if kl < 0 else 0
        if self._below_zero == SUSPICIOUS:
            rank_zero_warn(
                f"the mean KL to the reference was negative in {SUSPICIOUS} updates in a row, which its estimate over"
                " fair samples cannot be for long: look at sampling.top_k and top_p, and at policy/sampler_mismatch"
            )
        return {"objective/kl_coefficient": used}

    # parts of the phases

    @property
    def run_seed(self) -> int:
        """The seed of samples and minibatches."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def policy_and_values(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log-probabilities [N, L], values [N, L, S], and entropies [N, L] where they are rewarded."""
        assert self.policy is not None
        assert self.critic is not None
        temperature = self.sampling.temperature
        if self.ppo.entropy_coefficient > 0:
            logps, entropy = self.policy.logps_and_entropy(sequences, temperature)
            return logps, self.critic(sequences), entropy
        if self.critic_options.form == "heads":  # both from one pass over the body
            return *self.critic.policy_and_values(sequences, temperature), None
        return self.logps(sequences, temperature), self.critic(sequences), None

    def mixed(self, experience: Experience) -> Tensor:
        """Return the advantages [B, T] that the policy learns from, at the multipliers of now."""
        mixed, mask = self.multipliers.mix(experience.advantages), experience.mask
        if self.dual.form == "mixed" or not self.ppo.standardise:
            return mixed
        return standardise(mixed, mask, center=True, moments=_moments(mixed, mask), floor=self.ppo.floor)

    def constraint_values(self, experience: Experience, rows: Sequence[int] | None = None) -> dict[str, float]:
        """Return the constraints' means over the episodes of all processes, in the run's units.

        Args:
            experience: of `advantages`.
            rows: positions to take; None takes all.
        """
        chosen = slice(None) if rows is None else torch.tensor(list(rows), dtype=torch.long, device=self.device)
        values = experience.constraint_values[chosen].double()
        weights = torch.ones_like(values[:, 0]) if values.shape[1] else values.new_zeros(len(values))
        if self.dual.per == "token":
            weights = experience.mask.sum(-1)[chosen].double()
        sums = summed(torch.cat([(values * weights[:, None]).sum(0), weights.sum()[None]]))
        return dict(zip(self.multipliers.constraints, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def _sampled(
        self, prompts: list[Prompt], numbers: list[int], categories: list[str | None] | None, draw: tuple[int, int]
    ) -> Rollout:
        """Sample in as many passes as the process with most rows needs; `draw` is (update, sample number)."""
        update, sample = draw
        parts = []
        for part in passes(range(len(prompts)), self._most(len(prompts)), self.ppo.rollout_batch_size):
            generators = [row_generator(self.run_seed, update, numbers[i], sample) for i in part.rows]
            rollout = self.sample([prompts[i] for i in part.rows], generators, self.sampling)
            kinds = None if categories is None else [categories[i] for i in part.rows]
            parts += [replace(rollout, categories=kinds)] if part.counts else []
        return joined(parts)

    def _judged(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the reference's log-probabilities, [B, T], and the critic's values, [B, T, S]."""
        assert self.critic is not None
        count, width = rollout.token_logps.shape
        reference = torch.zeros_like(rollout.token_logps)
        values = reference.new_zeros(count, width, 1 + len(self.multipliers))
        for part in passes(range(count), self._most(count), self.ppo.micro_batch_size):
            rows = torch.tensor(part.rows, device=reference.device)
            sequences, cut = trimmed(rollout.sequences, rows)
            with self._inference():
                logps = self.reference_token_logps(sequences, self.sampling.temperature)
                found = self.critic(sequences)
            reference[rows, : width - cut] = logps[:, cut - width :].to(reference)
            values[rows, : width - cut] = found[:, cut - width :].to(values)
        return reference, values

    def _streams(self, scores: Mapping[str, Tensor], rollout: Rollout, reference: Tensor) -> Tensor:
        """Return the rewards of all streams, [B, T, S]; where costs are subtracted they are charged the KL too."""
        mask, logps = rollout.response_mask, rollout.token_logps
        penalty = kl_rewards(logps, reference, mask, float(self.progress.kl_coefficient))
        task = penalise_unended(self.objective.combine(scores), rollout.ended, self.ppo.unended_penalty)
        streams = [terminal_rewards(task, mask) + penalty]
        for name in self.multipliers.constraints:
            own = -kl_rewards(logps, reference, mask, 1.0) if name == KL else terminal_rewards(scores[name], mask)
            streams.append(own - penalty if self.dual.form == "reward_minus_cost" else own)
        return torch.stack(streams, -1)

    def _standardised(self, advantages: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
        """Standardise each stream over all processes; one whose returns do not differ is only centred.

        Such a stream's advantages are the critic's noise, which unit variance would make as loud as a signal.
        """
        if not self.ppo.standardise or self.dual.form == "reward_minus_cost":
            return advantages
        returns, _ = gae(rewards, torch.zeros_like(rewards), mask, self.ppo.gamma, 1.0)
        count, total, squares = _moments(returns, mask)
        spread = (squares / count - (total / count).square()).clamp_min(0).sqrt()
        moments = _moments(advantages, mask)
        scaled = standardise(advantages, mask, center=True, moments=moments, floor=0.0)
        centred = standardise(advantages, mask, center=True, moments=moments, floor=float("inf"))
        return torch.where(spread > self.ppo.floor, scaled, centred)

    def _most(self, count: int) -> int:
        return max(gathered(count))

    def _backward(self, loss: Tensor) -> None:
        if self._trainer is None:
            loss.backward()
        else:
            self.manual_backward(loss)

    # what is seen from outside

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Sample held-out prompts and log KL and scores."""
        rollout = self._sampled(list(batch.prompts), batch.index.tolist(), list(batch.categories), (0, 2))
        reference, _ = self._judged(rollout)
        kl = kl_estimates(rollout.token_logps, reference, rollout.response_mask)
        scores = {f"objective/scores/{name}/raw": found.total for name, found in self.score(rollout).items()}
        self.log_validation({"objective/kl": kl["k1"], "objective/kl_k3": kl["k3"], **scores})

    test_step = validation_step

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

    def probe_extras(self, rollout: Rollout, logps: Tensor, reference_logps: Tensor) -> dict[str, Any]:
        """Return the constraints as the last update left them (before the first, at step 0), and the rewards' units."""
        found = self.multipliers.report()
        for name, entry in found.items():
            if entry["value"] != entry["value"]:  # not measured yet
                entry["value"] = self.start(name)
        scale = self.scale.report() if self.proxy_scorer is None else None  # the probe's proxy is the rewards
        return {"constraints": found or None, "reward_scale": scale}

    def start(self, name: str) -> float:
        """Return the value of a reward, or of "kl", at step 0, in the run's units; tolerances are measured from it."""
        return 0.0 if name == KL else self.scale.start(name)


class Progress(Kept):
    """What a run has done: updates, responses learnt from, and where the KL coefficient stands."""

    def __init__(self, kl_coefficient: float) -> None:
        super().__init__()
        self.updates: Tensor
        self.examples: Tensor
        self.kl_coefficient: Tensor
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("examples", torch.tensor(0))
        self.register_buffer("kl_coefficient", torch.tensor(float(kl_coefficient)))


def _method(objective: Objective, constraints: Sequence[Constraint], dual: Dual) -> str:
    """Name the method as its config is called, where it is one of the known ones."""
    kinds = {type(constraint) for constraint in constraints}
    if not kinds:
        return "ppo_sat" if isinstance(objective, Satisficing) else "ppo"
    if dual.form == "mixed" and isinstance(objective, NegativeKL) and kinds in ({AtLeast}, {Equal}):
        return "ppo_mu" if kinds == {AtLeast} else "ppo_xi"
    known = dual.form == "mixed" and isinstance(objective, WeightedReward) and kinds == {AtMost}
    return "ppo_all" if known else "ppo_lagrangian"


def _all_scorers(scorers: Sequence[Scorer | None]) -> Iterator[Scorer]:
    """Yield scorers and those inside them."""
    for scorer in scorers:
        if scorer is not None:
            yield scorer
            yield from _all_scorers(getattr(scorer, "scorers", []))


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, sum and sum of squares over all processes."""
    count, total, squares = masked_moments(x, mask)
    table = summed(torch.stack([count.expand_as(total), total, squares]))
    return table[0].flatten()[0], table[1], table[2]


def _clip(x: Tensor, bound: float) -> Tensor:
    return x.clamp(-bound, bound)


def _rows_of(sequences: Sequences, rows: Sequence[int]) -> Sequences:
    return trimmed(sequences, torch.tensor(list(rows), device=sequences.ids.device))[0]
