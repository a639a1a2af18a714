"""Reward models from pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.functional.disagreement import collapsed
from lit_rlhf.functional.preference import bradley_terry
from lit_rlhf.models.backbone import evaluating
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.models.scorers import score_rows
from lit_rlhf.modules.base import BaseModule
from lit_rlhf.types import LossOutput, PreferenceBatch, Prompt, Scores


class RewardModule(BaseModule):
    """Trains a Bradley-Terry reward model: one scalar score a response.

    loss = -log sigmoid(chosen - rejected - margin) + centering (c + r)^2 + l2 (c^2 + r^2) / 2    a pair

    The mean and standard deviation of its scores over the validation responses are kept with the model, as the last
    validation of a `fit` found them; `validate` and `test` leave them as they are.

    Departure: the scale is that of the data's responses, chosen and rejected, not of samples of the reference policy,
    which is not at hand here. On it the scores of a policy's samples may have another mean and spread.

    Args:
        use_margin: subtract the rows' `margin` where the data give one.
        centering: pulls the mean score of a pair to zero; 0.01 is common, 0 is off.
        l2: weight of the squared scores; 0.001 in the code of 2310.02743.
        base: arguments of `BaseModule`.
    """

    method = "reward"

    def __init__(self, *, use_margin: bool = False, centering: float = 0.0, l2: float = 0.0, **base: Any) -> None:
        super().__init__(**base)
        self.use_margin, self.centering, self.l2 = use_margin, centering, l2
        self.reward_model: Any = None
        self._held_out: list[tuple[Tensor, Tensor]] = []  # scores and labels of each validation batch
        self._moments: tuple[Tensor, Tensor] | None = None
        self.keep_hyper_parameters(use_margin=use_margin, centering=centering, l2=l2)

    def build_models(self) -> None:
        """Load the body and its score head."""
        self.reward_model = RewardModel(self.model_name_or_path, self.options)

    def backbones(self) -> list[Any]:
        """Return the loaded model."""
        return [] if self.reward_model is None else [self.reward_model]

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's mean over pairs."""
        scores, output = self.losses(batch)
        right = graded(output.metrics["reward/accuracy"], batch.label)
        self.log_means(output.metrics | {"reward/accuracy": right}, output.loss)
        self.log("reward/std", scores.detach().std(), batch_size=1)  # of this rank's micro-batch
        return output.loss.sum() / batch.share.examples

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the last validation."""
        self._held_out, self._moments = [], None

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Log accuracy and margin on held-out pairs, and return the 2B scores, chosen first, for who observes."""
        scores, output = self.losses(batch)
        self._held_out.append((scores.detach().double(), batch.label))
        right = graded(output.metrics["reward/accuracy"], batch.label)
        self.log_validation({"loss": output.loss, **output.metrics, "reward/accuracy": right})
        return {"scores": self.combined(scores.detach())}

    def on_validation_epoch_end(self) -> None:
        """Keep mean and standard deviation of the scores of all held-out responses, over all ranks."""
        if self.trainer.sanity_checking:
            return
        _, std = self.settle()
        stage = "test" if self.trainer.testing else "val"
        self.log(f"{stage}/reward/std", std.float().mean())

    def settle(self) -> tuple[Tensor, Tensor]:
        """Measure the scores of all held-out responses, once, and keep their scale where this is a `fit`.

        Callbacks that need the scale call it: Lightning runs their epoch-end hooks before the module's. All processes
        take part.

        Returns:
            Mean and standard deviation, [] or [K].
        """
        if self._moments is None:
            scores = torch.cat([scores for scores, _ in self._held_out])
            sums = torch.stack([torch.ones_like(scores).sum(0), scores.sum(0), scores.square().sum(0)])
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
            mean = sums[1] / sums[0]
            self._moments = mean, (sums[2] / sums[0] - mean.square()).clamp_min(0).sqrt()
            if self.trainer.state.fn == "fit":
                self._keep_scale(*self._moments)
        return self._moments

    def _keep_scale(self, mean: Tensor, std: Tensor) -> None:
        """Keep the scale; none of scores that are all alike, for these have no unit."""
        flat = collapsed(mean, std)
        if flat.any():
            which = f" by members {flat.nonzero()[:, 0].tolist()}" if flat.ndim else ""
            rank_zero_warn(f"step {self.trainer.global_step}: all held-out responses are scored alike{which}; no scale")
        self.reward_model.set_scale(mean.masked_fill(flat, torch.nan), std.masked_fill(flat, torch.nan))

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def losses(self, batch: PreferenceBatch) -> tuple[Tensor, LossOutput]:
        """Return the scores, [2B] with chosen first, and the loss of each pair, [B]."""
        scores = self.reward_model(batch.sequences)
        chosen, rejected = scores.chunk(2)
        return scores, self.pair_losses(chosen, rejected, batch)

    def pair_losses(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> LossOutput:
        """Return the loss of each pair, [B]; for K members' scores [K, B], [K B]."""
        members = chosen.numel() // len(batch.label)
        margin = batch.margin.repeat(members) if self.use_margin else None
        label = batch.label.repeat(members)
        return bradley_terry(chosen.flatten(), rejected.flatten(), margin, self.centering, self.l2, label=label)

    def combined(self, scores: Tensor) -> Scores:
        """Make one score a response of what the model gives."""
        return Scores(scores)

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> Scores:
        """Score responses in raw units; categories are not read."""
        with evaluating(self):
            return self.combined(score_rows(self.reward_model, self.text_encoder(), prompts, responses))

    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write a folder that plain transformers scores with; called on all ranks."""
        self.reward_model.export(folder, self.text_encoder().tokenizer, merged=merge)


def graded(wins: Tensor, label: Tensor) -> Tensor:
    """Say how right each pair is by its majority label, ties half; a pair of label exactly 1/2 is not graded.

    Args:
        wins: [B], 1 where chosen scores higher, 1/2 where equal, else 0.
        label: [B], probability that the chosen response is the better one.

    Returns:
        [G], in the order of the G <= B graded pairs.
    """
    return torch.where(label > 0.5, wins, 1 - wins)[label != 0.5]
