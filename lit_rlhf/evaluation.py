"""How a scorer fares on a file of pairs: accuracy overall, by category and averaged over categories, as on RewardBench.

Every pair counts as one comparison that `chosen` should win; equal scores count half. Votes and margins are not read: a
pair is right or wrong. A ranked row is all its pairs of unequal rank. Intervals take pairs of one prompt as moving
together (`lit_rlhf.functional.calibration.proportion`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_rlhf.data.rows import digest, normalise
from lit_rlhf.errors import UserError
from lit_rlhf.functional.pair_stats import Pairs, summarise
from lit_rlhf.functional.probe_stats import finite
from lit_rlhf.report_parts import padded

COUNTED = "every pair once, `chosen` as the better response; equal scores half; votes and margins not read"
Row = Mapping[str, Any]
_SIDES = ("chosen", "rejected")


def evaluate(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the statistics of scored pairs, see `functional.pair_stats.summarise`; lengths are in characters.

    Args:
        rows: as `predict` writes them for pairs: `prompt`, `chosen`, `rejected`, perhaps `category`, and `scores` with
            the `total` of both; at least one.

    Raises:
        UserError: a score is no finite number.
    """
    scores = {side: np.array([row["scores"][side]["total"] for row in rows], np.float64) for side in _SIDES}
    for side, values in scores.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise UserError(f"pair {bad[0] + 1}: the score of `{side}` is {values[bad[0]]}; expected a finite number")
    lengths = {side: np.array([len(row[side]) for row in rows], np.float64) for side in _SIDES}
    pairs = Pairs(
        chosen=scores["chosen"],
        rejected=scores["rejected"],
        label=np.ones(len(rows)),
        chosen_length=lengths["chosen"],
        rejected_length=lengths["rejected"],
        prompts=np.array([digest(normalise(row["prompt"])) >> 1 for row in rows], np.int64),
        categories=[row.get("category") for row in rows],
    )
    found = {"counted": COUNTED, "length_unit": "characters", **summarise(pairs)}
    return dict(finite({name: value for name, value in found.items() if name != "experts"}))


def table(summary: Row) -> str:
    """Return a summary as plain text: a line for each category, their average, and all pairs together."""
    lines: list[tuple[str, ...]] = [("category", "pairs", "prompts", "accuracy", "95 %", "longer is better", "Brier")]
    lines += [_cells(name, entry) for name, entry in summary["categories"].items()]
    if summary["macro"] is not None:
        lines.append(_cells("mean over categories", {"accuracy": summary["macro"]}))
    lines.append(_cells("all pairs", summary))
    note = f"ECE {summary['ece']:.3f}; {summary['ties']} of {summary['accuracy']['n']} pairs are ties, which count half"
    return f"{padded(lines)}\n{note}"


def write(path: str | Path, summary: Row) -> Path:
    """Write a summary beside the scores at `path`, with `.summary.json` for its ending, and return where."""
    place = Path(path)
    place = place.with_name(place.name.removesuffix(".jsonl") + ".summary.json")
    place.write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return place


def _cells(name: str, entry: Row) -> tuple[str, ...]:
    right, rule, squared = entry["accuracy"], entry.get("length_accuracy"), entry.get("brier")
    return (
        name,
        str(right["n"]),
        str(right["clusters"]),
        f"{right['value']:.3f}",
        f"[{right['low']:.3f}, {right['high']:.3f}]",
        "" if rule is None else f"{rule['value']:.3f}",
        "" if squared is None else f"{squared:.3f}",
    )
