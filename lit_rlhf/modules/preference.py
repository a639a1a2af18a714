"""Direct alignment: DPO and its relatives, one concatenated forward pass a batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlhf.functional.preference import DPO, PreferenceLoss
from lit_rlhf.models.reference_cache import ReferenceCache, fingerprint
from lit_rlhf.modules.policy import PolicyModule
from lit_rlhf.specs import build_optional
from lit_rlhf.types import LossOutput, PairLogps, PreferenceBatch, Rollout, Sequences, UserError

HELD_OUT_PAIRS = 128  # enough for a margin's trend, cheap beside sampling


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
        self.label = f"{self.method} beta {self.loss.beta:g}"
        self.precompute_reference = precompute_reference
        self.cache_dir = cache_dir
        self.cache: ReferenceCache | None = None
        self._held_out_step: int | None = None
        self._held_out: dict[str, float] = {}
        self.keep_hyper_parameters(
            loss=self.loss, precompute_reference=precompute_reference, cache_dir=cache_dir, proxy=self.proxy_scorer
        )

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the step's mean over pairs."""
        output = self.losses(batch, self.cache)
        self.log_means(output.metrics, output.loss)
        return output.loss.sum() / batch.share.examples

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log loss, implicit rewards and log-probabilities on held-out pairs."""
        output = self.losses(batch)
        self.log_validation({"loss": output.loss, **output.metrics})

    test_step = validation_step

    def losses(self, batch: PreferenceBatch, cache: ReferenceCache | None = None) -> LossOutput:
        """Return the loss and metrics of each pair, [B]; the reference's side live, or from a cache."""
        policy = pair_logps(self.logps(batch.sequences), batch.sequences)
        if cache is None:
            reference = pair_logps(self.reference_token_logps(batch.sequences), batch.sequences)
        else:
            reference = PairLogps(*cache.rows(batch.index), policy.chosen_length, policy.rejected_length)
        return self.loss(policy, reference, label=batch.label)

    def on_fit_start(self) -> None:
        """Take the reference's log-probabilities of the training pairs from disk, or compute and keep them."""
        if not self.precompute_reference:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        settings = {"dtype": self.options.dtype, "attn": self.options.attn_implementation}
        settings["precision"] = str(self.trainer.precision)
        name = fingerprint(self.model_name_or_path, self.text_encoder(), data.fingerprint, **settings)
        self.cache = ReferenceCache.load(self.cache_dir, name)
        first = next(iter(data.loader("train")))
        if not self.trainer.strategy.broadcast(self.cache is not None):  # rank 0 decides: all compute, or none
            self.cache = self._computed(data)
            if self.trainer.is_global_zero:
                rank_zero_info(f"reference log-probabilities kept in {self.cache.save(self.cache_dir, name)}")
        if self.cache is None:
            raise UserError(f"{self.cache_dir!r} holds the reference's log-probabilities on rank 0's disk, not on this")
        live = self._live(first)
        self.cache.verify(first.index, live.chosen.cpu(), live.rejected.cpu())

    def _live(self, batch: PreferenceBatch) -> PairLogps:
        with self._inference():
            return pair_logps(
                self.reference_token_logps(batch.sequences.to(self.device)), batch.sequences.to(self.device)
            )

    def _computed(self, data: Any) -> ReferenceCache:
        """Every rank computes its share of the pairs; the shares are added up, and each row must have come once."""
        table = torch.zeros(3, len(data.examples("train").items), device=self.device)
        for batch in data.loader("train"):
            live = self._live(batch)
            table[:, batch.index] = torch.stack([live.chosen, live.rejected, torch.ones_like(live.chosen)]).float()
        table = self.trainer.strategy.reduce(table, reduce_op="sum").cpu()
        assert bool((table[2] == 1).all()), "the ranks' shares of the pairs overlap or leave rows out"
        return ReferenceCache(table[0].contiguous(), table[1].contiguous())

    def probe_extras(self, rollout: Rollout, logps: Tensor, reference_logps: Tensor) -> dict[str, Any]:
        """Return what the probe reports of direct alignment.

        `implicit_reward`, [B], is beta x log-ratio of the policy's own samples: beta x KL in the mean, and no proxy.
        `implicit_margin` and `implicit_accuracy` are means over fixed held-out pairs, measured once a probe.
        """
        if self._held_out_step != self.trainer.global_step:
            self._held_out_step, self._held_out = self.trainer.global_step, self._measure_held_out()
        return {"implicit_reward": self.loss.beta * (logps - reference_logps).sum(-1), **self._held_out}

    @torch.no_grad()
    def _measure_held_out(self) -> dict[str, float]:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        with self._inference():
            found = [self.losses(batch.to(self.device)).metrics for batch in data.held_out(HELD_OUT_PAIRS)]
        names = {"implicit_margin": "rewards/margins", "implicit_accuracy": "rewards/accuracies"}
        columns = {name: [metrics[metric] for metrics in found] for name, metric in names.items()}
        return {name: torch.cat(column).mean().item() for name, column in columns.items() if column}


def pair_logps(token_logps: Tensor, sequences: Sequences) -> PairLogps:
    """Sum [2B, L] token log-probabilities to pairs; chosen rows come first."""
    logps, lengths = token_logps.sum(-1), sequences.response_lengths
    chosen, rejected = logps.chunk(2)
    return PairLogps(chosen, rejected, *torch.chunk(lengths, 2))
