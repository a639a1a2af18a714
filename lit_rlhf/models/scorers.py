"""Scorers that need a model or somebody's code: a Hugging Face reward model, a function, an ensemble of scorers.

All take plain arguments, keep each under its own name, and give scores on the CPU in float32. None is an `nn.Module`,
so that a training module may hold one without saving or training it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlhf.encoding import Encoded, Encoder
from lit_rlhf.functional.aggregation import Mean, RewardAggregator
from lit_rlhf.models.loading import ModelOptions
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.types import Prompt, Scorer, Scores, UserError


class HFRewardModel(Scorer):
    """A reward model folder or hub id as a scorer, with its own tokenizer and chat template.

    It reads prompts and responses as text or messages, never somebody else's token ids. Rows are scored in batches of
    like length; a row's score does not depend on the batch it is in.

    Args:
        path: sequence classifier with one score (full or LoRA), or a `builtin:` name.
        batch_size: rows in one forward pass; >= 1.
        joiner: text between a string prompt and its response.
        normalise: subtract the mean and divide by the spread that the model keeps of its scores.
        max_length: window in tokens; None takes the model's, at most 1024.
        device: None takes the current GPU where there is one, else the CPU.
        dtype: of the weights; the head works in float32 in any case.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        joiner: str = " ",
        *,
        normalise: bool = False,
        max_length: int | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"HFRewardModel: batch_size must be >= 1, got {batch_size}")
        self.path, self.batch_size, self.joiner = path, batch_size, joiner
        self.normalise, self.max_length, self.device, self.dtype = normalise, max_length, device, dtype
        self._loaded: tuple[RewardModel, Encoder] | None = None

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        categories: Sequence[str | None] | None = None,  # noqa: ARG002 - one reward model for all categories
    ) -> Scores:
        """Score each response; categories are not read.

        Raises:
            UserError: a prompt fills the window alone, or `path` is no reward model.
        """
        model, encoder = self._load()
        rows = self._encode(encoder, prompts, responses)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        total = torch.zeros(len(rows))
        device = model.score_mean.device
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = encoder.collate([rows[i] for i in chosen]).to(device)
            with torch.autocast(device.type, enabled=False):
                total[chosen] = model(batch).cpu()
        if self.normalise:
            total = (total - model.score_mean.cpu()) / model.score_std.cpu()
        return Scores(total)

    def _encode(self, encoder: Encoder, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Encoded]:
        rows = []
        for number, row in enumerate(encoder.encode_many(prompts, responses), 1):
            if row is None:
                window = encoder.max_length
                raise UserError(f"{self.path}: prompt {number} alone fills the reward model's window, {window} tokens")
            rows.append(row)
        return rows

    def _load(self) -> tuple[RewardModel, Encoder]:
        if self._loaded is None:
            encoder = Encoder.from_pretrained(self.path, joiner=self.joiner, max_length=self.max_length)
            model = RewardModel(self.path, ModelOptions(dtype=self.dtype), fresh_head=False)
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = model.requires_grad_(requires_grad=False).eval().to(device), encoder
        return self._loaded


class FunctionScorer(Scorer):
    """A Python function as a scorer: `function(prompts, responses, categories)` returns one float a response.

    Args:
        function: import path, "package.module:name" or "package.module.name".

    Raises:
        UserError: nothing callable is found there.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self._call = _imported(function)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> Scores:
        """Score each response.

        Raises:
            UserError: the function returned another number of scores, or one that is no finite number.
        """
        values = self._call(prompts, responses, categories)
        try:
            total = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.function} must return one float a response, got {type(values).__name__}") from error
        if total.shape != (len(responses),):
            raise UserError(f"{self.function} was given {len(responses)} responses and returned {tuple(total.shape)}")
        if not total.isfinite().all():
            row = int((~total.isfinite()).nonzero()[0])
            raise UserError(f"{self.function} returned {total[row].item()} for response {row + 1}: {responses[row]!r}")
        return Scores(total)


class Ensemble(Scorer):
    """Several scorers behind one number.

    total = aggregator(members),    members_k = (score_k - mean_k) / std_k where `scales` are given

    Args:
        scorers: K members.
        aggregator: [B, K] to [B]; the mean when left out.
        scales: K pairs (mean, std), the std > 0, both measured on one and the same set of responses. Members on
            different scales let one member decide a worst case alone.
    """

    def __init__(
        self,
        scorers: list[Scorer],
        aggregator: RewardAggregator | None = None,
        scales: list[tuple[float, float]] | None = None,
    ) -> None:
        if not scorers:
            raise UserError("Ensemble: scorers must name at least one scorer")
        if scales is not None and len(scales) != len(scorers):
            raise UserError(f"Ensemble: {len(scorers)} scorers need as many scales, got {len(scales)}")
        if scales is not None and not all(std > 0 for _, std in scales):
            raise UserError(f"Ensemble: every std of scales must be > 0, got {scales}")
        self.scorers, self.scales = list(scorers), scales
        self.aggregator = Mean() if aggregator is None else aggregator

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> Scores:
        """Score by all members and aggregate; `members` holds what the aggregator saw, [B, K]."""
        totals = [scorer.score(prompts, responses, categories).total.cpu() for scorer in self.scorers]
        members = self._scaled(torch.stack(totals, -1))
        return Scores(self.aggregator(members), members)

    def _scaled(self, members: Tensor) -> Tensor:
        if self.scales is None:
            return members
        means, stds = members.new_tensor(self.scales).unbind(-1)
        return (members - means) / stds


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no function can be imported from {path!r} ({error}); expected package.module:name") from error
    if not callable(found):
        raise UserError(f"{path!r} is a {type(found).__name__}; expected a function")
    return found
