"""Scorers that need a model or somebody's code: a Hugging Face reward model, a function, an ensemble of scorers.

All take plain arguments, keep each under its own name, and give scores on the CPU in float32. None is an `nn.Module`,
so that a training module may hold one without saving or training it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lit_rlhf.encoding import Encoder
from lit_rlhf.functional.aggregation import Mean, RewardAggregator
from lit_rlhf.models.ensemble import RewardEnsemble, load_ensemble
from lit_rlhf.models.loading import ModelOptions
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.types import Prompt, Scorer, Scores, UserError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
            UserError: a prompt fills the window alone, `path` is no reward model, or it keeps no scale and `normalise`
                is set.
        """
        model, encoder = self._load()
        total = score_rows(model, encoder, prompts, responses, self.batch_size)
        if self.normalise:
            total = model.standardise(total)
        return Scores(total)

    def _load(self) -> tuple[RewardModel, Encoder]:
        if self._loaded is None:
            encoder = Encoder.from_pretrained(self.path, joiner=self.joiner, max_length=self.max_length)
            model = RewardModel(self.path, ModelOptions(dtype=self.dtype), fresh_head=False)
            self._loaded = frozen(model, self.device), encoder
        return self._loaded


class EnsembleRewardModel(Scorer):
    """An ensemble folder as a scorer: every member reads every response in one batched forward pass.

    total = aggregator(members),    members_k = (score_k - mean_k) / std_k unless `raw`

    Mean and standard deviation are those that each member keeps of its scores on held-out responses of the data, so
    that offsets and scales between members do not pass for disagreement.

    Args:
        path: folder that `RewardEnsemble.export` wrote.
        aggregator: [B, K] to [B]; the mean when left out.
        batch_size: rows in one forward pass of one member; >= 1.
        joiner: text between a string prompt and its response.
        raw: combine the members' raw scores.
        max_length: window in tokens; None takes the model's, at most 1024.
        device: None takes the current GPU where there is one, else the CPU.
        dtype: of the weights; the heads work in float32 in any case.
    """

    def __init__(
        self,
        path: str,
        aggregator: RewardAggregator | None = None,
        batch_size: int = 64,
        joiner: str = " ",
        *,
        raw: bool = False,
        max_length: int | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"EnsembleRewardModel: batch_size must be >= 1, got {batch_size}")
        self.path, self.batch_size, self.joiner, self.raw = path, batch_size, joiner, raw
        self.aggregator = Mean() if aggregator is None else aggregator
        self.max_length, self.device, self.dtype = max_length, device, dtype
        self._loaded: tuple[RewardEnsemble, Encoder] | None = None

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        categories: Sequence[str | None] | None = None,  # noqa: ARG002 - one ensemble for all categories
    ) -> Scores:
        """Score each response by all members and aggregate; `members` holds what the aggregator saw, [B, K].

        Raises:
            UserError: a prompt fills the window alone, `path` is no ensemble, or a member keeps no scale and `raw` is
                not set.
        """
        model, encoder = self._load()
        scores = score_rows(model, encoder, prompts, responses, self.batch_size).reshape(len(responses), model.members)
        members = scores if self.raw else model.standardise(scores)
        return Scores(self.aggregator(members), members)

    def _load(self) -> tuple[RewardEnsemble, Encoder]:
        if self._loaded is None:
            model = load_ensemble(self.path, ModelOptions(dtype=self.dtype))
            encoder = Encoder.from_pretrained(self.path, joiner=self.joiner, max_length=self.max_length)
            self._loaded = frozen(model, self.device), encoder
        return self._loaded


def frozen(model: ModuleT, device: str | None) -> ModuleT:
    """Put a model to work: in eval mode, without gradients, on `device` or the current GPU or else the CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.requires_grad_(requires_grad=False).eval().to(device)


@torch.no_grad()
def score_rows(
    model: nn.Module, encoder: Encoder, prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int = 64
) -> Tensor:
    """Score responses in batches of like length.

    Returns:
        [B] or [B, K] on the CPU, as the model gives them; a row does not depend on the batch it is in.

    Raises:
        UserError: a prompt fills the window alone.
    """
    rows = []
    for number, row in enumerate(encoder.encode_many(prompts, responses), 1):
        if row is None:
            raise UserError(f"prompt {number} alone fills the reward model's window, {encoder.max_length} tokens")
        rows.append(row)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(order), batch_size):
        batch = encoder.collate([rows[i] for i in order[start : start + batch_size]]).to(device)
        with torch.autocast(device.type, enabled=False):
            parts.append(model(batch).cpu())
    if not parts:
        return torch.zeros(0)
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()]


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
