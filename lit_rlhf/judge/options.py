"""Which judge is asked, about what, and how patiently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lit_rlhf.errors import UserError

Points = Mapping[str, str]
_FORMS = "`name=description`, several separated by `;`, or a .yaml or .json file"


@dataclass(frozen=True)
class JudgeOptions:
    """An LLM judge. Its key is read from the environment variable OPENAI_API_KEY alone; a local server may need none.

    Args:
        url: where the judge answers, for example http://localhost:8000/v1; without it nobody is asked.
        model: the model's name at that server.
        points: `name=description`, several separated by `;`, or a .yaml or .json file that maps names to
            descriptions, or categories to such maps.
        soft: write `aspects_soft` too, the probability that chosen is better, from the server's log-probabilities.
        concurrency: requests under way at once; >= 1.
        timeout: seconds until a request counts as failed; > 0.
        max_retries: further tries after 429, 5xx, a timeout, a lost connection or a broken answer; >= 0.
        backoff: seconds before the first further try, doubled each time up to a minute, with jitter; > 0. A
            server's Retry-After may lengthen it.
        max_failures: questions in a row without an answer after which the run stops; >= 1.
        max_tokens: of an answer; 0 leaves it to the server. An answer that is cut there has no verdict.
        temperature: of an answer; null leaves it to the server.
        price_in: of a million tokens of questions, in any currency.
        price_out: of a million tokens of answers, in the same.
        cache: file that keeps every answer; `OUT.answers.jsonl` beside the output unless set.
        extra: further fields of each request, for example {"chat_template_kwargs": {"enable_thinking": false}}.

    Raises:
        UserError: a value outside its range, or a judge without url, model or points.
    """

    url: str = ""
    model: str = ""
    points: str = ""
    soft: bool = False
    concurrency: int = 8
    timeout: float = 60.0
    max_retries: int = 6
    backoff: float = 0.5
    max_failures: int = 20
    max_tokens: int = 512
    temperature: float | None = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    cache: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UserError naming the option and what was expected."""
        least = {"concurrency": 1, "max_retries": 0, "max_failures": 1, "max_tokens": 0, "price_in": 0, "price_out": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UserError(f"judge.{name} must be >= {bound}, got {getattr(self, name)}")
        for name in ("timeout", "backoff"):
            if not getattr(self, name) > 0:
                raise UserError(f"judge.{name} must be > 0 seconds, got {getattr(self, name)}")
        needed = {name: getattr(self, name) for name in ("url", "model", "points")}
        if any(needed.values()) and not all(needed.values()):
            missing = ", ".join(f"judge.{name}" for name, value in needed.items() if not value)
            raise UserError(f"a judge needs judge.url, judge.model and judge.points; missing: {missing}")
        if self.url:
            _check_url(self.url)

    def request(self, text: str) -> dict[str, Any]:
        """Return the request that asks one question."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": self.max_tokens} if self.max_tokens else {}
        body |= {"temperature": self.temperature} if self.temperature is not None else {}
        body |= {"logprobs": True, "top_logprobs": 5} if self.soft else {}
        return body | self.extra

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the price of so many tokens, in the currency of the prices."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


def read_points(text: str) -> dict[str | None, dict[str, str]]:
    """Return category to {point: description}; the category None holds for every row.

    Raises:
        UserError: no such file, or neither of the forms it may have.
    """
    if not text.endswith((".yaml", ".yml", ".json")):
        parts = [part.partition("=") for part in text.split(";") if part.strip()]
        if any(not equals for _, equals, _ in parts):
            raise UserError(f"judge.points: {text!r} is none of: {_FORMS}")
        return {None: _points("judge.points", {name.strip(): value for name, _, value in parts})}
    content = _load(Path(text))
    if not isinstance(content, dict) or not content:
        raise UserError(f"{text}: expected an object of names and descriptions, or of categories and such objects")
    if all(isinstance(value, dict) for value in content.values()):
        return {str(category): _points(f"{text}, {category}", points) for category, points in content.items()}
    return {None: _points(text, content)}


def _load(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"judge.points: {path} cannot be read ({error.strerror}); expected {_FORMS}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"judge.points: {path} is broken: {' '.join(str(error).split())}") from error


def _points(place: str, values: Mapping[Any, Any]) -> dict[str, str]:
    for name, value in values.items():
        if not isinstance(name, str) or not name or not isinstance(value, str) or not value.strip():
            raise UserError(f"{place}: the point {name!r} has the description {value!r}; expected a non-empty text")
    if not values:
        raise UserError(f"{place}: no points; expected {_FORMS}")
    return {name: " ".join(value.split()) for name, value in values.items()}


def _check_url(url: str) -> None:
    """Refuse what is no plain address, without showing it: people put keys in there."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    except ValueError:
        plain = False
    if not plain or "@" in url:
        raise UserError(
            "judge.url must be http(s)://HOST[:PORT]/PATH with neither user, password nor query; "
            "the key comes from the environment variable OPENAI_API_KEY"
        )
