"""The nouns: what flows between the rooms of the package, each with its shape.

Legend: B pairs or sequences, N rows of a batch, L whole sequence, P prompt and T response tokens, K ensemble members.
Masks are boolean and True where a token counts; they are made once, in `lit_rlhf.encoding`, and travel from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from lit_rlhf.errors import UserError as UserError  # noqa: PLC0414 - part of this module's public names

Message = dict[str, str]
Prompt = str | list[Message]


class Movable:
    """Gives a record of tensors `.to(device)`, which is how Lightning moves batches of its own kinds."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the same record with every tensor, also in nested records, moved by `Tensor.to`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {k: v.to(*args, **kwargs) if isinstance(v, Tensor | Movable) else v for k, v in values.items()}
        return type(self)(**moved)


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both responses of B pairs under one model.

    Args:
        chosen: [B], nats, summed over the response tokens.
        rejected: [B], nats, summed over the response tokens.
        chosen_length: [B], response tokens, the end token included.
        rejected_length: [B], response tokens, the end token included.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


@dataclass(frozen=True)
class LossOutput:
    """A loss per example, and what to log beside it.

    Args:
        loss: [B], unreduced.
        metrics: name to [B], detached.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores(Movable):
    """What a scorer thinks of B responses, in its own raw units.

    Args:
        total: [B], the one number that ranks responses.
        members: [B, K], the scores behind `total` where an ensemble made it.
        parts: name to [B], named components where the scorer has them.
    """

    total: Tensor
    members: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class Scorer(ABC):
    """Anything that scores responses: the gold reward, a reward model, an ensemble, a function, a judge."""

    @abstractmethod
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> Scores:
        """Score each response to its prompt; all three sequences have length B."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        temperature: divides the logits, also wherever log-probabilities of the sample are taken; > 0.
        top_p: nucleus mass in (0, 1]; 1 keeps all. Anything else biases KL estimates.
        top_k: keeps the k likeliest tokens; 0 keeps all. Anything else biases KL estimates.
        max_new_tokens: response tokens at most, the end token included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        """Raise ValueError naming the field and its range."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Sequences(Movable):
    """N token rows: prompt, then response, then padding (left of the prompt, right of the response, or both).

    Args:
        ids: [N, L], int64.
        attention_mask: [N, L], True on real tokens.
        response_mask: [N, L], True on the response tokens that count, the end token included.
    """

    ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def response_lengths(self) -> Tensor:
        """[N], response tokens a row."""
        return self.response_mask.sum(-1)

    @property
    def position_ids(self) -> Tensor:
        """[N, L], positions counted over real tokens, so that padding on either side changes nothing."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp_min(0)


@dataclass(frozen=True)
class Share(Movable):
    """What a micro-batch divides its sums by, so that ranks and accumulated micro-batches add up to one global mean.

    Each is the total over the whole optimizer step (all ranks, all accumulated micro-batches) divided by ranks times
    `accumulate_grad_batches`, since that is what Lightning divides by, in a ragged last step too. The data module knows
    the totals in advance because it plans the steps.

    Args:
        examples: [], pairs or sequences.
        tokens: [], response tokens (of both responses, for pairs).
    """

    examples: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class SequenceBatch(Movable):
    """N prompts with one response each, for supervised fine-tuning.

    Args:
        sequences: N rows.
        share: the divisors of this micro-batch.
        index: [N], row numbers in the data set.
    """

    sequences: Sequences
    share: Share
    index: Tensor


@dataclass(frozen=True)
class PreferenceBatch(Movable):
    """B pairs as 2B rows, chosen rows first: one forward pass sees both.

    With several streams (the data orders of an ensemble's members) each is a block of its own: the first 2B rows and
    the first B labels are the first stream's, and so on.

    Args:
        sequences: 2B rows; row i and row i + B answer the same prompt.
        label: [B], probability that `chosen` is the better one; 1 unless soft labels were asked for.
        margin: [B], margin of the pair in score units; 0 where the data give none.
        share: the divisors of this micro-batch.
        index: [B], row numbers in the data set.
        categories: B category names or None.
        streams: how many streams.
    """

    sequences: Sequences
    label: Tensor
    margin: Tensor
    share: Share
    index: Tensor
    categories: tuple[str | None, ...] = ()
    streams: int = 1


@dataclass(frozen=True)
class CategoryBatch(Movable):
    """B prompts with their category, for a router.

    Args:
        sequences: B rows, the user's turns.
        label: [B], int64, the number of the category.
        share: the divisors of this micro-batch.
        index: [B], row numbers in the data set.
    """

    sequences: Sequences
    label: Tensor
    share: Share
    index: Tensor


@dataclass(frozen=True)
class ExpertBatch(Movable):
    """B pairs as 2B rows, better ones first, each pair for the experts of its own category.

    Args:
        phase: what is trained with them: "task", "capability" or "mixture".
        sequences: 2B rows; row i and row i + B answer the same prompt.
        category: [B], int64, the number of the category.
        point: [B], int64, the number of the capability point within its category; -1 where the pair as a whole counts.
        weight: [B], 1 / pairs of the same prompt (and point), so that each prompt counts once.
        label: [B], probability that the first row of the pair is the better one.
        divisor: [], sum of the weights of the optimizer step; see `Share`.
        index: [B], row numbers in the data set of the phase.
        aspects: [B, K], labels of all points of the category: 1 (`chosen` is better), -1, 0 (unknown, no such point).
        questions: B rows for a router, the user's turns; None in training.
        categories: B names of the categories.
    """

    phase: str
    sequences: Sequences
    category: Tensor
    point: Tensor
    weight: Tensor
    label: Tensor
    divisor: Tensor
    index: Tensor
    aspects: Tensor
    questions: Sequences | None = None
    categories: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """B sampled responses with everything that scoring, KL and policy gradients need.

    Args:
        prompts: B prompts as the data gave them.
        responses: B texts, without the end token.
        sequences: B rows of P + T columns: prompts padded on the left, responses on the right.
        token_logps: [B, T], nats, by a fresh pass of the policy at the sampling temperature; 0 outside the response.
        sampler_logps: [B, T], the same quantity kept by the sampler while it decoded.
        ended: [B], True where the response closed with a stop token before the limit.
        sampling: how the rows were drawn.
        categories: B category names or None, where the data know them; reward models that route by category read them.
    """

    prompts: list[Prompt]
    responses: list[str]
    sequences: Sequences
    token_logps: Tensor
    sampler_logps: Tensor
    ended: Tensor
    sampling: Sampling
    categories: list[str | None] | None = None

    @property
    def response_mask(self) -> Tensor:
        """[B, T], True on response tokens."""
        return self.sequences.response_mask[:, -self.token_logps.shape[1] :]


@runtime_checkable
class Probeable(Protocol):
    """What every policy module offers to the gold probe."""

    method: str

    def sample(self, prompts: list[Prompt], generator: Sequence[torch.Generator], sampling: Sampling) -> Rollout:
        """Draw one response per prompt, each row from its own generator."""
        ...

    def reference_logps(self, rollout: Rollout) -> Tensor:
        """Return the reference's token log-probabilities of the sampled responses, [B, T], 0 outside the mask."""
        ...

    def proxy(self, rollout: Rollout) -> Scores | None:
        """Score the samples by the configured reward model; None where the run has none."""
        ...


def numbered(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Return the numbers that a count (from 0) or a list of numbers stands for.

    Raises:
        UserError: none, one below 0, or one twice; the message names the key `name`.
    """
    numbers = tuple(range(value) if isinstance(value, int) else value)
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise UserError(f"{name} must be a count >= 1, or different numbers >= 0, got {value}")
    return numbers
