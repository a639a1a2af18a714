"""Direct alignment: DPO and its relatives, one concatenated forward pass a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional.preference import DPO, PreferenceLoss
from lit_rlhf.models.reference_cache import ReferenceCache
from lit_rlhf.modules.policy import PolicyModule
from lit_rlhf.specs import build_optional
from lit_rlhf.types import LossOutput, PairLogps, PreferenceBatch, Rollout, Sequences


class PreferenceModule(PolicyModule):
    """Trains a policy on preference pairs by a loss of the `PreferenceLoss` family.

    Args:
        loss: DPO, IPO, SLiC, RDPO or RPO; DPO with beta 0.1 when left out.
        precompute_reference: compute the reference's log-probabilities of the data once, before training, and keep
            them on disk under a fingerprint of model, tokenizer, template, data and lengths.
        cache_dir: where they are kept.
        base: arguments of `PolicyModule` and `BaseModule`.
    """

    def __init__(
        self,
        loss: PreferenceLoss | None = None,
        *,
        precompute_reference: bool = False,
        cache_dir: str = "runs/cache",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.loss = build_optional(loss, PreferenceLoss) or DPO(beta=0.1)
        self.method = type(self.loss).__name__.lower()
        self.precompute_reference = precompute_reference
        self.cache_dir = cache_dir
        self.cache: ReferenceCache | None = None
        self.keep_hyper_parameters(
            loss=self.loss, precompute_reference=precompute_reference, cache_dir=cache_dir, proxy=self.proxy_scorer
        )

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's mean over pairs."""
        output = self.losses(batch)
        self.log_means(output.metrics, output.loss)
        return output.loss.sum() / batch.share.examples

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log loss, implicit rewards and log-probabilities on held-out pairs."""
        output = self.losses(batch)
        self.log_validation({"loss": output.loss, **output.metrics})

    test_step = validation_step

    def losses(self, batch: PreferenceBatch) -> LossOutput:
        """Return the loss and metrics of each pair, [B]."""
        policy = pair_logps(self.logps(batch.sequences), batch.sequences)
        reference = pair_logps(self._reference(batch), batch.sequences)
        return self.loss(policy, reference, label=batch.label)

    def _reference(self, batch: PreferenceBatch) -> Tensor:
        return self.reference_token_logps(batch.sequences)

    def probe_extras(self, rollout: Rollout, logps: Tensor, reference_logps: Tensor) -> dict[str, Tensor]:
        """Return beta x log-ratio of the policy's own samples, [B]: beta x KL in the mean, and no proxy."""
        log_ratio = (logps - reference_logps).sum(-1)
        return {"implicit_reward": self.loss.beta * log_ratio}


def pair_logps(token_logps: Tensor, sequences: Sequences) -> PairLogps:
    """Sum [2B, L] token log-probabilities to pairs; chosen rows come first."""
    logps, lengths = token_logps.sum(-1), sequences.response_lengths
    chosen, rejected = logps.chunk(2)
    return PairLogps(chosen, rejected, *torch.chunk(lengths, 2))
