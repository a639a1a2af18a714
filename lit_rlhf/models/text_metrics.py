"""Scorers that compare a response with the reference response to its prompt: text overlap, and intent.

Both read the references from a JSONL file with `prompt` and `response`, and judge each response alone: a score does
not depend on what else was or will be scored. Their source is the DailyDialog setting of Moskovitz et al. 2023,
arXiv:2310.04373, whose code gives every response the mean over all responses so far.

METEOR, the overlap of that paper, is not among them: it needs word nets that must be downloaded. chrF, which matches
parts of words too, is the nearest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lit_rlhf.assets import resolve
from lit_rlhf.models.loading import ModelOptions, load_config, load_model
from lit_rlhf.models.scorers import frozen
from lit_rlhf.types import Prompt, Scorer, Scores, UserError

Overlap = Literal["chrf", "rouge1", "rouge2", "rougeL", "bleu1", "bleu2", "bleu3", "bleu4"]


class TextOverlap(Scorer):
    """Overlap of a response with the reference responses to its prompt, by torchmetrics, in [0, 1].

    With several references to a prompt the best one counts (BLEU takes n-grams from all of them, as it is defined).

    Args:
        references: JSONL file of `prompt` and `response`; a prompt may have several rows.
        metric: "chrf" (character 6-grams and word 2-grams, F2), "rouge1", "rouge2" or "rougeL" (F1), or "bleu1" to
            "bleu4" (words, smoothed; 0 where no n-gram of the highest order matches, as in most short responses).

    Raises:
        UserError: the file is missing or a row of it is malformed, or no such metric.
    """

    def __init__(self, references: str, metric: Overlap = "chrf") -> None:
        known = Overlap.__args__  # type: ignore[attr-defined]
        if metric not in known:
            raise UserError(f"TextOverlap: metric must be one of {', '.join(known)}, got {metric!r}")
        self.references, self.metric = references, metric
        self._known = read_references(references)

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        categories: Sequence[str | None] | None = None,  # noqa: ARG002 - a reference knows no category
    ) -> Scores:
        """Score each response against the references of its own prompt.

        Raises:
            UserError: a prompt has no reference.
        """
        rows = zip(responses, _references_of(self._known, self.references, prompts), strict=True)
        return Scores(torch.tensor([self._overlap(response, known) for response, known in rows]))

    def _overlap(self, response: str, references: list[str]) -> float:
        from torchmetrics.functional.text import bleu_score, chrf_score, rouge_score

        found: Any
        if self.metric == "chrf":
            found = chrf_score([response], [references])
        elif self.metric.startswith("bleu"):
            found = bleu_score([response], [references], n_gram=int(self.metric[4:]), smooth=True)
        else:
            found = rouge_score([response], [references], rouge_keys=self.metric)[f"{self.metric}_fmeasure"]
        return float(found)


class IntentMatch(Scorer):
    """1 where a classifier gives a response the label that it gives a reference response to the same prompt, else 0.

    Departures from arXiv:2310.04373: the classifier reads the response alone, and the reference's label is its own
    prediction, not the data set's annotation.

    Args:
        path: a sequence classifier of two labels or more, folder or hub id.
        references: JSONL file of `prompt` and `response`; with several rows to a prompt any may match.
        batch_size: responses in one forward pass; >= 1.
        max_length: window in tokens, longer responses are cut; None takes the model's, at most 1024.
        device: None takes the current GPU where there is one, else the CPU.
        dtype: of the weights.

    Raises:
        UserError: the file is missing or a row of it is malformed, or a number is out of range.
    """

    def __init__(
        self,
        path: str,
        references: str,
        batch_size: int = 64,
        *,
        max_length: int | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"IntentMatch: batch_size must be >= 1, got {batch_size}")
        self.path, self.references, self.batch_size = path, references, batch_size
        self.max_length, self.device, self.dtype = max_length, device, dtype
        self._known = read_references(references)
        self._labels: dict[str, int] = {}  # of references met so far
        self._loaded: tuple[Any, Any] | None = None

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        categories: Sequence[str | None] | None = None,  # noqa: ARG002 - a reference knows no category
    ) -> Scores:
        """Score each response against the references of its own prompt.

        Raises:
            UserError: a prompt has no reference, or `path` is no classifier.
        """
        known = _references_of(self._known, self.references, prompts)
        new = list(dict.fromkeys(text for texts in known for text in texts if text not in self._labels))
        self._labels |= dict(zip(new, self.labels(new), strict=True))
        wanted = [{self._labels[text] for text in texts} for texts in known]
        found = zip(self.labels(responses), wanted, strict=True)
        return Scores(torch.tensor([float(label in labels) for label, labels in found]))

    @torch.no_grad()
    def labels(self, texts: Sequence[str]) -> list[int]:
        """Return the number of the likeliest label of each text."""
        model, tokenizer = self._load()
        order, found = sorted(range(len(texts)), key=lambda i: len(texts[i])), [0] * len(texts)
        device, window = next(model.parameters()).device, self._window(model, tokenizer)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            # an empty response leaves some tokenizers nothing to classify
            batch = tokenizer(
                [texts[i] or " " for i in chosen], padding=True, truncation=True, max_length=window, return_tensors="pt"
            )
            with torch.autocast(device.type, enabled=False):
                logits = model(batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)).logits
            for i, label in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                found[i] = label
        return found

    def _window(self, model: Any, tokenizer: Any) -> int:
        own = getattr(model.config, "max_position_embeddings", None) or 1024
        return self.max_length or min(1024, own, tokenizer.model_max_length)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            path, options = resolve(self.path), ModelOptions(dtype=self.dtype)
            config = load_config(path, options)
            if config.num_labels < 2:
                raise UserError(f"{path}: a classifier of two labels or more was expected, got {config.num_labels}")
            model = load_model(AutoModelForSequenceClassification, path, options, config)
            tokenizer = AutoTokenizer.from_pretrained(path)
            if tokenizer.pad_token_id is None:
                raise UserError(f"{path}: the classifier's tokenizer has no padding token, so it takes no batches")
            self._loaded = frozen(model, self.device), tokenizer
        return self._loaded


def read_references(path: str) -> dict[str, list[str]]:
    """Read a JSONL file of `prompt` (string or messages) and `response` into texts of prompts and their responses.

    Raises:
        UserError: the file is missing or empty, or a row is malformed; the message names the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such file; expected JSON lines with `prompt` and `response`")
    found: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            prompt, response = _row(line, f"{path}:{number}")
            found.setdefault(_key(prompt), []).append(response)
    if not found:
        raise UserError(f"{path}: the file holds no rows; expected JSON lines with `prompt` and `response`")
    return found


def _row(line: str, place: str) -> tuple[Prompt, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: broken JSON in {line[:60]!r}; expected one object a line") from error
    prompt, response = (row.get("prompt"), row.get("response")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str | list) or not isinstance(response, str) or not response.strip():
        raise UserError(f"{place}: expected `prompt` and a non-empty string `response`, got {line[:60]!r}")
    return prompt, response


def _references_of(known: dict[str, list[str]], path: str, prompts: Sequence[Prompt]) -> list[list[str]]:
    found = []
    for prompt in prompts:
        if _key(prompt) not in known:
            raise UserError(f"{path} has no reference response to the prompt {str(prompt)[:80]!r}")
        found.append(known[_key(prompt)])
    return found


def _key(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[str(turn.get("role")), str(turn.get("content"))] for turn in prompt])
