"""Proximal policy optimisation against any number of reward models, each free, weighed, or held at a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.functional.constrained import Constraint
from lit_rlhf.functional.control import FixedKL, KLController
from lit_rlhf.functional.policy_gradient import kl_estimates
from lit_rlhf.functional.sequence import standardise
from lit_rlhf.modules.actor_critic import ActorCriticModule
from lit_rlhf.modules.experience import Experience
from lit_rlhf.modules.multipliers import Dual, Multipliers
from lit_rlhf.modules.objective import NegativeKL, Objective
from lit_rlhf.modules.on_policy import KL
from lit_rlhf.modules.optimizer import planned_steps
from lit_rlhf.modules.ppo_experience import make_experience
from lit_rlhf.modules.ppo_learning import learn
from lit_rlhf.modules.ppo_options import CriticOptions, PPOOptions
from lit_rlhf.modules.ppo_progress import Progress, method_of
from lit_rlhf.modules.reduce import gathered, moments, summed
from lit_rlhf.specs import build, build_optional
from lit_rlhf.types import Rollout, Sampling, Scorer, Scores, SequenceBatch, Share, UserError

SUSPICIOUS = 5  # updates in a row with a negative mean KL, after which it is no chance


class PPOModule(ActorCriticModule):
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
        options = build_optional(ppo, PPOOptions) or PPOOptions()
        super().__init__(
            rewards=rewards, objective=objective, sampling=sampling, units=units, seed=seed,
            scale_samples=options.scale_samples, rollout_batch_size=options.rollout_batch_size,
            critic=build_optional(critic, CriticOptions) or CriticOptions(),
            micro_batch_size=options.micro_batch_size, with_entropy=options.entropy_coefficient > 0, **base,
        )  # fmt: skip
        self.automatic_optimization = False
        kept = [build(constraint, Constraint) for constraint in constraints or []]
        self.dual = build_optional(dual, Dual) or Dual()
        self.ppo = options
        self.kl = build_optional(kl, KLController) or FixedKL(0.0)
        self.clip_scores = clip_scores
        self._check(kept)
        self.multipliers = Multipliers(kept, self.dual)
        self.progress = Progress(self.kl.coefficient)
        self.share: Share | None = None
        self._below_zero = 0
        self.method = method_of(self.objective, kept, self.dual)
        self.keep_hyper_parameters(
            rewards=self.rewards or None, objective=self.objective, constraints=kept or None, dual=self.dual,
            ppo=self.ppo, kl=self.kl, critic=self.critic_options, sampling=self.sampling, units=units,
            clip_scores=clip_scores, seed=seed, proxy=self.proxy_scorer,
        )  # fmt: skip

    def _check(self, constraints: Sequence[Constraint]) -> None:
        names = self.reward_names
        for constraint in constraints:
            if constraint.name not in (*names, KL):
                raise UserError(f"a constraint names {constraint.name!r}; expected one of {', '.join((*names, KL))}")
        if self.options.lora is not None and self.options.lora.dropout > 0:
            raise UserError(
                f"lora.dropout must be 0 in PPO, got {self.options.lora.dropout}: the policy that learns would not be"
                " the one that sampled"
            )
        if isinstance(self.objective, NegativeKL) and not self.kl.coefficient > 0:
            raise UserError("objective NegativeKL needs kl.coefficient > 0: there is nothing else in the task")
        if self.clip_scores is not None and not self.clip_scores > 0:
            raise UserError(f"clip_scores must be > 0, got {self.clip_scores}")

    # models, optimizer, start

    @property
    def streams(self) -> int:
        """The task's stream and one for each constraint."""
        return 1 + len(self.multipliers)

    @property
    def mixes_standardised(self) -> bool:
        """Whether streams are standardised each by itself, before they are mixed."""
        return self.ppo.standardise and self.dual.form == "mixed"

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
        """Return one optimizer with a group for the policy and one for the critic, and a schedule over its steps."""
        optimizer = self.optimizer_options.build(self.parameter_groups())
        return [optimizer], [self.optimizer_options.schedule_for(optimizer, planned_steps(self.trainer))]

    def setup(self, stage: str) -> None:
        """Look whether a rollout can be cut as asked for, and gradients be clipped.

        Raises:
            UserError: a rollout has fewer rows than minibatches, or gradients are scaled for float16.
        """
        super().setup(stage)
        if self.trainer.precision == "16-mixed":
            raise UserError("trainer.precision 16-mixed scales gradients, which PPO clips itself; expected bf16-mixed")
        rows = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if stage == "fit" and rows is not None and rows * self.trainer.world_size < self.ppo.minibatches:
            raise UserError(
                f"data.batch_size {rows} on {self.trainer.world_size} processes gives fewer rows an update than"
                f" ppo.minibatches, {self.ppo.minibatches}"
            )

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
            for _ in range(int(metrics["policy/steps"])):  # fewer than planned where `stop_at_kl` ended the update
                self.lr_schedulers().step()  # type: ignore[union-attr]
        # Lightning counts batches; the step that the probe and checkpoints go by is the optimizer's
        self.log("loss", metrics.pop("loss"), prog_bar=True, batch_size=1)
        self.log_dict(metrics | {"step": float(self.trainer.global_step)}, batch_size=1)

    def rollout(self, batch: Any) -> Rollout:
        """Draw one response to every prompt of a `PromptBatch`, each row from a generator of its own."""
        return self.sampled(list(batch.prompts), batch.index.tolist(), list(batch.categories), (self.updates, 0))

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
        return make_experience(self, index, rollout, scores)

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
        return learn(self, experience, optimizer, demonstrations if self.ppo.ptx_coefficient else None)

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

    def mixed(self, experience: Experience) -> Tensor:
        """Return the advantages [B, T] that the policy learns from, at the multipliers of now."""
        mixed, mask = self.multipliers.mix(experience.advantages), experience.mask
        if self.mixes_standardised or not self.ppo.standardise:
            return mixed
        return standardise(mixed, mask, center=True, moments=moments(mixed, mask), floor=self.ppo.floor)

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

    # what is seen from outside

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Sample held-out prompts and log KL and scores."""
        rollout = self.sampled(list(batch.prompts), batch.index.tolist(), list(batch.categories), (0, 2))
        kl = kl_estimates(rollout.token_logps, self.judged_reference(rollout), rollout.response_mask)
        scores = {f"objective/scores/{name}/raw": found.total for name, found in self.score(rollout).items()}
        self.log_validation({"objective/kl": kl["k1"], "objective/kl_k3": kl["k3"], **scores})

    test_step = validation_step

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
