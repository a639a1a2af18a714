"""The gold reward of the built-in world: seven aspects of a response, computed exactly from two strings."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch

from lit_rlhf.data.world_language import (
    CERTAIN,
    DESCRIBING,
    HEDGING,
    NOUNS,
    WARM,
    category_of,
    points_of,
    well_formed,
    words_of,
)
from lit_rlhf.types import Prompt, Scorer, Scores

ASPECTS = ("relevance", "completeness", "certainty", "warmth", "variety", "length_fit", "flow")

# What each category cares about, and the amount of each aspect at which it is best; both in the order of ASPECTS.
WEIGHTS: dict[str, tuple[float, ...]] = {
    "role_play": (0.5, 0.4, 1.2, 2.0, 1.2, 2.0, 1.6),
    "chit_chat": (0.4, 0.4, 1.0, 2.4, 1.0, 2.0, 1.6),
    "subjective_qa": (0.5, 0.5, 1.6, 1.6, 1.2, 2.0, 1.6),
    "objective_qa": (0.6, 0.6, 2.4, 1.2, 1.0, 2.0, 1.6),
    "text_creation": (0.5, 0.5, 1.0, 1.6, 2.2, 2.0, 1.6),
}
PEAKS: dict[str, tuple[float, ...]] = {
    "role_play": (0.24, 1.0, 2.6, 4.0, 5.0, 27.0, 7.0),
    "chit_chat": (0.20, 1.0, -2.0, 4.0, 5.0, 25.0, 7.0),  # small talk wants hedging
    "subjective_qa": (0.24, 1.0, 2.6, 4.0, 5.0, 27.0, 7.0),
    "objective_qa": (0.28, 1.0, 3.0, 1.0, 5.0, 27.0, 7.0),  # facts want certainty, and hardly any warmth
    "text_creation": (0.24, 1.0, 2.6, 4.0, 6.5, 30.0, 7.0),
}
_CERTAIN, _HEDGING, _WARM, _DESCRIBING = map(frozenset, (CERTAIN, HEDGING, WARM, DESCRIBING))
_END_MARKS = frozenset(".!?")
_MARKS = frozenset(string.punctuation)


def hump(amount: float, peak: float) -> float:
    """Reward an amount up to a peak and punish what goes beyond it, twice as steeply.

    With u = amount / peak:  h = u below 0,  2 u - u^2 up to the peak,  1 - 2 (u - 1)^2 beyond it,  and never below -2.
    So h is 0 at nothing and 1 at the peak. The rise flattens before the peak, so that data from below it look like
    "more is better", and labels say which of two responses is better, never by how much. A negative peak rewards
    negative amounts.
    """
    u = amount / peak
    if u < 0:
        return max(-2.0, u)
    return 2 * u - u * u if u < 1 else max(-2.0, 1 - 2 * (u - 1) ** 2)


def amounts(prompt: str, response: str) -> dict[str, float]:
    """Measure how much of each aspect a response has, before any peak is applied.

    - relevance: nouns of the prompt's topic less nouns of other topics, per word
    - completeness: points of the prompt that are named, less half of every repeated mention, per point asked about
    - certainty: certain words less hedging words
    - warmth: warm words
    - variety: different describing words less their repetitions
    - length_fit: words
    - flow: words in well-formed sentences less words in broken or unfinished ones, per sentence
    """
    tokens = words_of(response)
    words = [token for token in tokens if token not in _MARKS]
    points = points_of(prompt)
    topics = {NOUNS[point] for point in points}
    nouns = [NOUNS[word] in topics for word in words if word in NOUNS]
    mentions = [word for word in words if word in points]
    described = [word for word in words if word in _DESCRIBING]
    return {
        "relevance": (2 * sum(nouns) - len(nouns)) / max(1, len(words)),
        "completeness": (1.5 * len(set(mentions)) - 0.5 * len(mentions)) / max(1, len(points)),
        "certainty": float(len([w for w in words if w in _CERTAIN]) - len([w for w in words if w in _HEDGING])),
        "warmth": float(len([w for w in words if w in _WARM])),
        "variety": float(2 * len(set(described)) - len(described)),
        "length_fit": float(len(words)),
        "flow": _flow(tokens),
    }


def _flow(tokens: list[str]) -> float:
    total, sentences, sentence, words = 0, 0, list[str](), 0
    for token in [*tokens, ""]:
        if token and token not in _END_MARKS:
            sentence.append(token)
            words += token not in _MARKS
        elif sentence:
            total += words if token and well_formed(sentence) else -words
            sentences, sentence, words = sentences + 1, [], 0
    return total / max(1, sentences)


def aspect_values(prompt: str, response: str) -> dict[str, float]:
    """Give each aspect's value in [-2, 1], with the peaks of the prompt's category, unweighted."""
    measured = amounts(prompt, response).items()
    peaks = PEAKS[category_of(prompt)]
    return {name: hump(amount, peak) for (name, amount), peak in zip(measured, peaks, strict=True)}


def weighted_sum(prompt: str, values: dict[str, float]) -> float:
    """Add up aspect values with the weights of the prompt's category."""
    return sum(weight * value for weight, value in zip(WEIGHTS[category_of(prompt)], values.values(), strict=True))


def gold_reward(prompt: str, response: str) -> float:
    """Compute the gold reward, sum of weight[category] x hump(amount, peak[category]); any text has one."""
    return weighted_sum(prompt, aspect_values(prompt, response))


class WorldGold(Scorer):
    """The exact gold reward as a scorer; `parts` holds the unweighted aspects.

    The category is read off the prompt. Of a list of messages the last one is the prompt.
    """

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        categories: Sequence[str | None] | None = None,  # noqa: ARG002  # the prompt says it
    ) -> Scores:
        """Score each response to its prompt; `categories` is not used."""
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        values = [aspect_values(prompt, response) for prompt, response in zip(texts, responses, strict=True)]
        totals = [weighted_sum(prompt, value) for prompt, value in zip(texts, values, strict=True)]
        parts = {name: torch.tensor([value[name] for value in values], dtype=torch.float32) for name in ASPECTS}
        return Scores(total=torch.tensor(totals, dtype=torch.float32), parts=parts)
