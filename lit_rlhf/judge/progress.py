"""How far the asking is, what it cost, and what went wrong."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from lit_rlhf.judge.answers import Answer
from lit_rlhf.judge.options import JudgeOptions


@dataclass
class Progress:
    """Counts of one run, and a line on standard error every few seconds.

    Args:
        options: for the prices.
        total: questions to ask.
        before: questions answered in earlier runs.
        seconds: between two lines.
    """

    options: JudgeOptions
    total: int
    before: int = 0
    seconds: float = 5.0
    answered: int = 0
    failed: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    trouble: str = ""
    _start: float = field(default_factory=monotonic)
    _last: float = field(default_factory=monotonic)

    def count(self, answer: Answer | None) -> None:
        """Count a question that is done with, answered or not."""
        self.answered += answer is not None
        self.failed += answer is None
        if answer is not None:
            self.tokens_in += answer.tokens_in or 0
            self.tokens_out += answer.tokens_out or 0
            self.uncounted += answer.tokens_in is None or answer.tokens_out is None
        self.tick()

    def retry(self, wait: float) -> None:
        """Count a further try, and say so at once if it is far off."""
        self.retries += 1
        if wait > self.seconds:
            self._say(f"waiting {wait:.0f} s: {self.trouble}")
        self.tick()

    def tick(self) -> None:
        """Print the line when it is time."""
        if monotonic() - self._last >= self.seconds:
            self.show()

    def show(self) -> None:
        """Print the line."""
        self._last = monotonic()
        done = self.answered + self.failed
        parts = [f"{done} of {self.total} questions asked"]
        parts += [f"{self.failed} without an answer"] if self.failed else []
        parts += [f"{self.retries} further tries (last: {self.trouble})"] if self.retries else []
        parts += [f"{self.tokens_in:,} tokens in", f"{self.tokens_out:,} out"]
        parts += [self._cost(done)] if self.options.price_in or self.options.price_out else []
        if 0 < done < self.total:
            left = (monotonic() - self._start) / done * (self.total - done)
            parts.append(f"about {left:.0f} s left")
        self._say(", ".join(parts))

    def summary(self) -> dict[str, Any]:
        """Return the counts, and the cost in the currency of the prices."""
        names = ("answered", "failed", "retries", "tokens_in", "tokens_out", "uncounted")
        cost = self.options.cost(self.tokens_in, self.tokens_out)
        return {name: getattr(self, name) for name in names} | {"cost": cost}

    def _cost(self, done: int) -> str:
        cost = self.options.cost(self.tokens_in, self.tokens_out)
        counted = f" ({self.uncounted} answers uncounted)" if self.uncounted else ""
        ahead = f" of about {cost / done * self.total:.4g}" if 0 < done < self.total else ""
        return f"cost {cost:.4g}{ahead}{counted}"

    def _say(self, line: str) -> None:
        print(f"judge: {line}", file=sys.stderr, flush=True)
