"""Aspects of pairs by a judge who is asked twice, the order of the replies swapped, and believed where both agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.judge.answers import AnswerFile
from lit_rlhf.judge.asking import Request, ask
from lit_rlhf.judge.options import JudgeOptions, read_points
from lit_rlhf.judge.progress import Progress
from lit_rlhf.judge.question import VERSION, key_of, question
from lit_rlhf.judge.tally import Case, Row, Tally


def label_aspects(rows: Sequence[Row], options: JudgeOptions, out: str | Path) -> dict[str, Any]:
    """Write the rows with a judge's `aspects` to `out`, and a summary beside it.

    A point is 1 (chosen is better) or -1 (rejected is better) where both orders agree, 0 where they disagree or both
    see a tie, and absent where an answer is missing or has no verdict. With `soft`, `aspects_soft` holds for each
    point with two verdicts the mean over both orders of the probability that chosen is better. All other fields stay
    as they are, and so do aspects of other names. Every answer is kept in the cache when it arrives; `out` appears at
    the end, whole.

    Args:
        rows: pairs with `prompt`, `chosen`, `rejected` and, for points by category, `category`.
        options: the judge.
        out: JSONL to write.

    Returns:
        The summary.

    Raises:
        UserError: as `ask`; or no row has a category with points.
    """
    out = Path(out)
    cases = list(_cases(rows, options))
    wanted = {key for case in cases for key in case.keys}
    with AnswerFile(Path(options.cache) if options.cache else beside(out, ".answers.jsonl")) as answers:
        missing = sum(key not in answers for key in wanted)
        run = Progress(options, missing, before=len(wanted) - missing)
        print(f"judge: {len(wanted)} questions, {len(wanted) - run.total} of them answered before ({answers.path})")
        if run.total:
            ask(_open(cases, rows, options, answers), options, answers.add, run)
    tally = Tally(answers, options.soft)
    labelled = list(tally.label(rows, cases))
    summary = {
        "model": options.model,
        "url": options.url,
        "template": VERSION,
        "pairs": len(rows),
        "pairs_without_points": len(rows) - len({case.row for case in cases}),
        "pairs_without_labels": tally.unlabelled,
        "points": tally.points(),
        "questions": len(wanted),
        "questions_answered_before": len(wanted) - run.total,
        "answers_with_probabilities": sum(bool((a := answers.get(key)) and a.chances) for key in wanted),
        "this_run": run.summary(),
    }
    replace(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled))
    replace(beside(out, ".summary.json"), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def beside(out: Path, ending: str) -> Path:
    """Return the path of a file that belongs to `out`: `pairs.jsonl` has `pairs` with the ending."""
    return out.with_name(out.name.removesuffix(".jsonl") + ending)


def replace(path: Path, text: str) -> None:
    """Write a file such that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)


def _cases(rows: Sequence[Row], options: JudgeOptions) -> Iterator[Case]:
    points = read_points(options.points)
    listed = None not in points
    seen = {row.get("category") for row in rows}
    if listed and not seen & set(points):
        raise UserError(
            f"{options.points}: has points for the categories {', '.join(map(str, points))}; "
            f"the rows have {', '.join(sorted(map(str, seen)))}"
        )
    for i, row in enumerate(rows):
        category = row.get("category") if listed else None
        for name, text in points.get(category, {}).items():
            first, second = (key_of(_request(row, name, text, options, swapped=s)) for s in (False, True))
            yield Case(i, category, name, text, (first, second))


def _request(row: Row, name: str, description: str, options: JudgeOptions, *, swapped: bool) -> dict[str, Any]:
    replies = (row["rejected"], row["chosen"]) if swapped else (row["chosen"], row["rejected"])
    return options.request(question(row["prompt"], replies, name, description))


def _open(cases: Iterable[Case], rows: Sequence[Row], options: JudgeOptions, answers: AnswerFile) -> Iterator[Request]:
    """Yield each question that has no answer, once; equal pairs share theirs."""
    asked: set[str] = set()
    for case in cases:
        for key, swapped in zip(case.keys, (False, True), strict=True):
            if key not in answers and key not in asked:
                asked.add(key)
                yield key, _request(rows[case.row], case.name, case.description, options, swapped=swapped)
