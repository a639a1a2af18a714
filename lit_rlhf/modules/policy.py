"""What all policy modules share: a policy, its frozen reference, and the doors that the gold probe uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.models.backbone import Backbone, evaluating
from lit_rlhf.models.sampling import sample
from lit_rlhf.models.scorers import HFRewardModel
from lit_rlhf.modules.base import BaseModule, freeze
from lit_rlhf.specs import build_optional
from lit_rlhf.types import Prompt, Rollout, Sampling, Scorer, Scores, Sequences


class PolicyModule(BaseModule):
    """A causal language model that is trained, beside the frozen model it started from.

    With LoRA the reference is the same model with its adapters off; otherwise it is a second, frozen copy.

    Args:
        proxy: the reward model that the probe reports as the proxy; None takes the data's own, if they have one.
        base: arguments of `BaseModule`.
    """

    def __init__(self, proxy: Scorer | None = None, **base: Any) -> None:
        super().__init__(**base)
        self.proxy_scorer = build_optional(proxy, Scorer)
        self.policy: Backbone | None = None
        self.reference: Backbone | None = None

    def build_models(self) -> None:
        """Load the policy, and its reference where adapters do not give one for free."""
        self.policy = Backbone(self.model_name_or_path, self.options)
        if self.options.lora is None:
            frozen = replace(self.options, activation_checkpointing=False)
            self.reference = Backbone(self.model_name_or_path, frozen)
            freeze(self.reference)

    def backbones(self) -> list[Backbone]:
        """Return the loaded models."""
        return [model for model in (self.policy, self.reference) if model is not None]

    def on_train_epoch_start(self) -> None:
        """Keep the reference in eval mode, whatever Lightning did to its modes."""
        if self.reference is not None:
            self.reference.eval()

    def logps(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """Return the policy's token log-probabilities, [N, L], nats, 0 outside the response."""
        assert self.policy is not None
        return self.policy(sequences, temperature)

    @torch.no_grad()
    def reference_token_logps(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """Return the reference's token log-probabilities, [N, L], nats, 0 outside the response."""
        assert self.policy is not None
        if self.reference is not None:
            return self.reference(sequences, temperature)
        with evaluating(self.policy), self.policy.adapters_off():
            return self.policy(sequences, temperature)

    @torch.no_grad()
    def sample(self, prompts: list[Prompt], generator: Sequence[torch.Generator], sampling: Sampling) -> Rollout:
        """Draw one response per prompt, each row from its own generator.

        A row that reaches the end of the model's window stops there, whatever the limit on new tokens.
        """
        assert self.policy is not None
        encoder = self.text_encoder()
        rows = encoder.collate_prompts(prompts).to(self.device)
        with self._inference():
            sequences, sampler_logps, ended = sample(self.policy, rows, generator, sampling, encoder.stop_ids)
            logps = self.logps(sequences, sampling.temperature)[:, -sampler_logps.shape[1] :]
        texts = [encoder.response_text(ids[keep].tolist()) for ids, keep in zip(*_rows(sequences), strict=True)]
        return Rollout(prompts, texts, sequences, logps, sampler_logps, ended, sampling)

    def reference_logps(self, rollout: Rollout) -> Tensor:
        """Return the reference's token log-probabilities of the samples, [B, T], 0 outside the mask."""
        with self._inference():
            logps = self.reference_token_logps(rollout.sequences, rollout.sampling.temperature)
        return logps[:, -rollout.token_logps.shape[1] :]

    def proxy(self, rollout: Rollout) -> Scores | None:
        """Score the samples by the configured reward model, else by the data's own; None where there is none."""
        path = self._data_proxy()
        if self.proxy_scorer is None and path is not None:
            self.proxy_scorer = HFRewardModel(path)
        if self.proxy_scorer is None:
            return None
        return self.proxy_scorer.score(rollout.prompts, rollout.responses, rollout.categories)

    def _data_proxy(self) -> str | None:
        datamodule = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "proxy_path", None)

    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write a folder that plain transformers, or peft for adapters, loads; called on all ranks."""
        assert self.policy is not None
        self.policy.export(folder, self.text_encoder().tokenizer, merged=merge)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        # outside a step Lightning's autocast is off; the same precision as in training keeps KL at step 0 at exactly 0
        context = self.trainer.precision_plugin.forward_context() if self._trainer is not None else torch.no_grad()
        with context, evaluating(self):
            yield


def _rows(sequences: Sequences) -> tuple[Tensor, Tensor]:
    return sequences.ids.cpu(), sequences.response_mask.cpu()
