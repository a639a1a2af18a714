"""From answers to aspects, with a count of what became of every question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_rlhf.judge.answers import Answer, AnswerFile

Row = dict[str, Any]
OUTCOMES = ("kept", "disagreed", "tied", "no_verdict", "failed")


@dataclass(frozen=True)
class Case:
    """One pair at one point.

    Args:
        row: number of the pair.
        category: the category whose point it is; None for a point of every row.
        name: of the point.
        description: of the point.
        keys: of its two questions: the first shows chosen as reply A, the second as reply B.
    """

    row: int
    category: str | None
    name: str
    description: str
    keys: tuple[str, str]


class Tally:
    """Turns answers into aspects and counts what became of each case.

    Args:
        answers: the answers there are.
        soft: whether to write `aspects_soft`.
    """

    def __init__(self, answers: AnswerFile, soft: bool) -> None:
        self.answers, self.soft = answers, soft
        self.unlabelled = 0
        self._counts: dict[str, Counter[str]] = {}

    def label(self, rows: Sequence[Row], cases: Iterable[Case]) -> Iterator[Row]:
        """Yield every row in order with its aspects."""
        by_row: dict[int, list[Case]] = {}
        for case in cases:
            by_row.setdefault(case.row, []).append(case)
        for i, row in enumerate(rows):
            found = by_row.get(i, [])
            hard = {case.name: value for case in found if (value := self._hard(case)) is not None}
            self.unlabelled += not hard
            labelled = _merged(row, "aspects", found, hard)
            yield _merged(labelled, "aspects_soft", found, self._soft(found)) if self.soft else labelled

    def points(self) -> dict[str, dict[str, Any]]:
        """Return per point the counts, the keep rate, and the shares for chosen and for the reply shown first."""
        return {name: _shares(counts) for name, counts in self._counts.items()}

    def _hard(self, case: Case) -> int | None:
        """Return the aspect of a case; None without two verdicts."""
        group = case.name if case.category is None else f"{case.category}/{case.name}"
        counts = self._counts.setdefault(group, Counter())
        found = self._found(case)
        counts.update(f"shown_{answer.verdict}" for answer, _ in found)
        outcome, value = _outcome([answer.says(swapped=swapped) for answer, swapped in found])
        counts.update([outcome, *(["for_chosen"] if value == 1 else [])])
        return value

    def _soft(self, cases: Iterable[Case]) -> dict[str, float]:
        found = {}
        for case in cases:
            chances = [answer.chance(swapped=swapped) for answer, swapped in self._found(case)]
            whole = [chance for chance in chances if chance is not None]
            if len(whole) == 2:
                found[case.name] = sum(whole) / 2
        return found

    def _found(self, case: Case) -> list[tuple[Answer, bool]]:
        """Return the answers of a case, each with whether its question was the swapped one."""
        found = zip(map(self.answers.get, case.keys), (False, True), strict=True)
        return [(answer, swapped) for answer, swapped in found if answer is not None]


def table(points: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the keep rate of each point, and what became of the rest, a line a point."""
    names = ("disagreed", "tied", "no_verdict", "failed")
    wide = max([len("point"), *map(len, points)])
    lines = [f"{'point':{wide}}   pairs    kept  {'  '.join(f'{name:>10}' for name in names)}  shown first"]
    for name, point in points.items():
        counts = "  ".join(f"{point[outcome]:10}" for outcome in names)
        first = "-" if point["first_share"] is None else f"{point['first_share']:.1%}"
        lines.append(f"{name:{wide}} {point['pairs']:7} {point['keep_rate']:7.1%}  {counts}  {first:>11}")
    return "\n".join(
        [*lines, "shown first: share of the verdicts for A or B that name the first reply; 50% without bias"]
    )


def _outcome(said: Sequence[int | None]) -> tuple[str, int | None]:
    """Return what became of a case, and its aspect, from what the answers say for chosen."""
    if len(said) < 2:
        return "failed", None
    if None in said:
        return "no_verdict", None
    if said[0] != said[1]:
        return "disagreed", 0
    return ("kept" if said[0] else "tied"), said[0]


def _merged(row: Row, field: str, cases: Sequence[Case], found: Mapping[str, float]) -> Row:
    """Return the row with what was found in place of all that stood under the names asked about; no empty field."""
    if not cases:
        return row
    asked = {case.name for case in cases}
    merged = {name: value for name, value in (row.get(field) or {}).items() if name not in asked} | dict(found)
    rest = {name: value for name, value in row.items() if name != field}
    return rest | ({field: merged} if merged else {})


def _shares(counts: Counter[str]) -> dict[str, Any]:
    pairs = sum(counts[name] for name in OUTCOMES)
    sided = counts["shown_A"] + counts["shown_B"]
    return {
        "pairs": pairs,
        **{name: counts[name] for name in OUTCOMES},
        "keep_rate": counts["kept"] / pairs,
        "chosen_share": counts["for_chosen"] / counts["kept"] if counts["kept"] else None,
        "first_share": counts["shown_A"] / sided if sided else None,
    }
