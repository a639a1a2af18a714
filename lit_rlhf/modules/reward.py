"""Reward models from pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional.preference import bradley_terry
from lit_rlhf.models.backbone import evaluating
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.modules.base import BaseModule
from lit_rlhf.types import LossOutput, PreferenceBatch, Prompt, Scores, UserError


class RewardModule(BaseModule):
    """Trains a Bradley-Terry reward model: one scalar score a response.

    loss = -log sigmoid(chosen - rejected - margin) + centering (c + r)^2 + l2 (c^2 + r^2) / 2    a pair

    The mean and standard deviation of its scores over the validation responses are kept with the model.

    Args:
        use_margin: subtract the rows' `margin` where the data give one.
        centering: pulls the mean score of a pair to zero; 0.01 is common, 0 is off.
        l2: weight of the squared scores; 0.001 in 2310.02743.
        base: arguments of `BaseModule`.
    """

    method = "reward"

    def __init__(self, *, use_margin: bool = False, centering: float = 0.0, l2: float = 0.0, **base: Any) -> None:
        super().__init__(**base)
        self.use_margin, self.centering, self.l2 = use_margin, centering, l2
        self.reward_model: RewardModel | None = None
        self._scores: list[Tensor] = []
        self.keep_hyper_parameters(use_margin=use_margin, centering=centering, l2=l2)

    def build_models(self) -> None:
        """Load the body and its score head."""
        self.reward_model = RewardModel(self.model_name_or_path, self.options)

    def backbones(self) -> list[RewardModel]:
        """Return the loaded model."""
        return [] if self.reward_model is None else [self.reward_model]

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's mean over pairs."""
        scores, output = self.losses(batch)
        self.log_means(output.metrics, output.loss)
        self.log("reward/std", scores.detach().std(), batch_size=1)  # of this rank's micro-batch
        return output.loss.sum() / batch.share.examples

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the last validation."""
        self._scores = []

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log accuracy and margin on held-out pairs, and collect the scores for their mean and spread."""
        scores, output = self.losses(batch)
        self._scores.append(scores.detach().double())
        self.log_validation({"loss": output.loss, **output.metrics})

    def on_validation_epoch_end(self) -> None:
        """Keep mean and standard deviation of the scores of all held-out responses, over all ranks."""
        assert self.reward_model is not None
        scores = torch.cat(self._scores)
        sums = torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()])
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        mean = sums[1] / sums[0]
        std = (sums[2] / sums[0] - mean.square()).clamp_min(0).sqrt()
        if std > 0:
            self.reward_model.set_scale(mean.item(), std.item())
        self.log("val/reward/std", std.float())

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def losses(self, batch: PreferenceBatch) -> tuple[Tensor, LossOutput]:
        """Return the scores, [2B] with chosen first, and the loss of each pair, [B]."""
        assert self.reward_model is not None
        scores = self.reward_model(batch.sequences)
        chosen, rejected = scores.chunk(2)
        margin = batch.margin if self.use_margin else None
        return scores, bradley_terry(chosen, rejected, margin, self.centering, self.l2, label=batch.label)

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Score responses in raw units."""
        assert self.reward_model is not None
        encoder = self.text_encoder()
        rows = [encoder.encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        for number, row in enumerate(rows, 1):
            if row is None:
                raise UserError(f"row {number}: its prompt fills the model's window of {encoder.max_length} tokens")
        with evaluating(self):
            return Scores(self.reward_model(encoder.collate([r for r in rows if r is not None]).to(self.device)))

    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write a folder that plain transformers scores with; called on all ranks."""
        assert self.reward_model is not None
        self.reward_model.export(folder, self.text_encoder().tokenizer, merged=merge)
