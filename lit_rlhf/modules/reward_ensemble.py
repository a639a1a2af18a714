"""Ensembles of reward models from pairs, all members in one run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional.aggregation import Mean, RewardAggregator
from lit_rlhf.functional.disagreement import correlation, lowest, mixture_logit, products, spread
from lit_rlhf.functional.preference import bradley_terry
from lit_rlhf.models.ensemble import Mode, load_ensemble, new_ensemble
from lit_rlhf.models.reward import described
from lit_rlhf.modules.reward import RewardModule, graded
from lit_rlhf.specs import build_optional
from lit_rlhf.types import LossOutput, PreferenceBatch, Scores, UserError, numbered


class RewardEnsembleModule(RewardModule):
    """Trains K Bradley-Terry reward models that differ by seed alone: in where they start and in their data order.

    Coste et al. 2023, arXiv:2310.02743, section 3. Pairs and labels are the same for all. The gradient of a member is
    what it would be alone, and `gradient_clip_val` bounds the norm of each member's. Each member's mean and standard
    deviation over the validation responses are kept, and its scores are combined on that scale (see `RewardModule`).

    In training each member reads its own rows, so `reward/accuracy` is the members' mean; in validation all read the
    same, it is that of the combined score, and the disagreement is logged too.

    Args:
        members: K, or the members' numbers: [3] trains member 3 of K by itself. `data.streams` must be equal.
        mode: "lora" (experts on one frozen body), "full" (K bodies) or "heads" (on one frozen body).
        aggregator: makes one score of K; the mean when left out.
        raw: combine raw scores, not standardised ones.
        seed: of the members' start; None takes the run's.
        options: arguments of `RewardModule`. `model_name_or_path` may be a folder that an ensemble was exported to.
    """

    method = "reward_ensemble"

    def __init__(
        self,
        *,
        members: int | list[int] = 5,
        mode: Mode = "lora",
        aggregator: RewardAggregator | None = None,
        raw: bool = False,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.member_numbers = numbered("members", members)
        self.mode, self.raw, self.seed = mode, raw, seed
        self.aggregator: RewardAggregator = build_optional(aggregator, RewardAggregator) or Mean()
        self.keep_hyper_parameters(
            members=members, mode=mode, aggregator=self.aggregator, raw=raw, seed=seed,
            use_margin=self.use_margin, centering=self.centering, l2=self.l2,
        )  # fmt: skip

    def build_models(self) -> None:
        """Start new members, or go on with those of a folder."""
        assert self.member_numbers is not None
        path = self.model_name_or_path
        content = described(path)
        if content is None:
            seed = torch.initial_seed() if self.seed is None else self.seed
            self.reward_model = new_ensemble(path, self.options, self.member_numbers, self.mode, seed=seed)
            return
        if self.options.lora is not None:
            raise UserError(f"{path} has adapters of its own, which go on; expected model.lora to be null")
        self.reward_model = load_ensemble(path, self.options)
        found = (self.reward_model.mode, self.reward_model.members)
        if found != (self.mode, len(self.member_numbers)):
            wanted = f"mode {self.mode!r} and {len(self.member_numbers)}"
            raise UserError(f"{path} has mode {found[0]!r} and {found[1]} members; model.mode and members say {wanted}")

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the sum over members of the step's mean over pairs."""
        output = self._by_member(self.reward_model.forward_grouped(batch.sequences), batch)
        self.log_means(output.metrics, output.loss)
        return output.loss.sum() * self.reward_model.members / batch.share.examples

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each member's gradient by its own norm, so that it moves as it would alone."""
        if gradient_clip_val and gradient_clip_algorithm != "value":
            self.reward_model.clip_gradients(float(gradient_clip_val))
        else:  # entry by entry, which couples nobody
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Log each member's accuracy on held-out pairs.

        Returns:
            `scores`: a function that combines the 2B rows' scores, chosen first, once the validation has found their
            scale; `logits`: [B], of the members' mean probability that `chosen` is the better one.
        """
        scores: Tensor = self.reward_model(batch.sequences)
        output = self._by_member(scores.T, batch)
        self._held_out.append((scores.detach().double(), batch.label))
        del output.metrics["reward/accuracy"]  # that of the combined score comes once the scale is known
        self.log_validation({"loss": output.loss, **output.metrics})
        chosen, rejected = scores.detach().chunk(2)
        return {"scores": partial(self.combined, scores.detach()), "logits": mixture_logit(chosen - rejected)}

    def on_validation_epoch_end(self) -> None:
        """Keep the members' scale over all held-out responses and ranks, and log how they agree on it."""
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:
            return
        pairs = torch.cat([self.combined(scores).total.view(2, -1) for scores, _ in self._held_out], 1)
        wins = bradley_terry(pairs[0], pairs[1]).metrics["reward/accuracy"]
        self.log_validation({"reward/accuracy": graded(wins, torch.cat([label for _, label in self._held_out]))})
        self._log_disagreement(torch.cat([scores for scores, _ in self._held_out]))

    def _log_disagreement(self, scores: Tensor) -> None:
        """Log how the members differ on raw scores [N, K], where a constant member does not leave it undefined."""
        if self.reward_model.scaled:
            members = self.reward_model.standardise(scores)
            shares = {f"ensemble/min_member/{k}": share for k, share in enumerate(lowest(members).T)}
            self.log_validation({"ensemble/std": spread(members), **shares})
        if self.reward_model.members > 1:
            found = correlation(self.trainer.strategy.reduce(products(scores), reduce_op="sum"))
            self.log_validation({} if found is None else {"ensemble/correlation": found[None]})

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def combined(self, scores: Tensor) -> Scores:
        """Aggregate raw scores [N, K] on the members' scale; `members` holds what the aggregator saw."""
        members = scores if self.raw else self.reward_model.standardise(scores)
        return Scores(self.aggregator(members), members)

    def _by_member(self, scores: Tensor, batch: PreferenceBatch) -> LossOutput:
        """Return the losses of [K, 2B] scores, [K B], and each member's accuracy over the pairs that can be graded."""
        members = len(scores)
        chosen, rejected = scores.reshape(members, 2, -1).unbind(1)
        output = self.pair_losses(chosen, rejected, batch)
        labels = batch.label.repeat(chosen.numel() // len(batch.label)).view(members, -1)
        wins = output.metrics["reward/accuracy"].view(members, -1)
        right = [graded(won, label) for won, label in zip(wins, labels, strict=True)]
        own = {f"ensemble/accuracy/{k}": accuracy for k, accuracy in enumerate(right)}
        return LossOutput(output.loss, output.metrics | own | {"reward/accuracy": torch.cat(right)})
