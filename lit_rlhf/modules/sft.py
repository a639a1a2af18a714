"""Supervised fine-tuning on responses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf.modules.policy import PolicyModule
from lit_rlhf.types import SequenceBatch


class SFTModule(PolicyModule):
    """Maximises the likelihood of the responses, prompts excluded.

    loss = - sum of response token log-probs / response tokens, both over the whole optimizer step    (nats a token)

    Args:
        base: arguments of `PolicyModule` and `BaseModule`.
    """

    method = "sft"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.keep_hyper_parameters(proxy=self.proxy_scorer)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's mean over tokens."""
        nll = -self.logps(batch.sequences)
        self.log_means({}, nll[batch.sequences.response_mask])
        return nll.sum() / batch.share.tokens

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Log the mean negative log-likelihood a token."""
        nll = -self.logps(batch.sequences)
        self.log_validation({"loss": nll[batch.sequences.response_mask]})

    test_step = validation_step
