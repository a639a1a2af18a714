"""Over-optimisation curves: probe records of the seeds of one method as lines with bands against sqrt(KL).

Legend: S seeds, R records of a seed. Scores are in standard deviations of the step-0 samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_rlhf.functional.overoptimization import (
    DEGREES,
    STUDENT,
    Form,
    ScalingLaw,
    fit_scaling_law,
    overoptimization_drop,
)

Record = Mapping[str, Any]
Floats = NDArray[np.float64]
NORMAL = STUDENT[0]


@dataclass(frozen=True)
class Band:
    """A line with its 95 % interval; NaN where unknown.

    Args:
        middle: [R].
        low: [R].
        high: [R].
    """

    middle: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Curve:
    """One method's way through KL.

    Args:
        label: name for people.
        seeds: runs behind it.
        steps: [R], optimizer steps, or n for best-of-n.
        sqrt_kl: [R], square root of nats.
        gold: the gold score; None without a gold scorer.
        proxy: the proxy score; None without a proxy.
        fit: the law fitted to `gold`, relative to its first point; None where it cannot be.
    """

    label: str
    seeds: int
    steps: tuple[int, ...]
    sqrt_kl: Floats
    gold: Band | None
    proxy: Band | None
    fit: ScalingLaw | None


def curve_of(label: str, runs: Sequence[Sequence[Record]]) -> Curve:
    """Average the runs of one method, one for each seed, at the steps that all of them have.

    Args:
        label: name for people.
        runs: S lists of records, each by rising step; S >= 1.
    """
    by_step = [{place(record): record for record in run} for run in runs]
    steps = tuple(sorted(set.intersection(*(set(run) for run in by_step))))
    table = [[run[step] for step in steps] for run in by_step]
    sqrt_kl = np.array([[math.sqrt(max(_kl(record), 0.0)) for record in run] for run in table]).mean(0)
    gold, proxy = (_band(table, name) for name in ("gold", "proxy"))
    form: Form = "bon" if all("n" in record for run in table for record in run) else "rl"
    return Curve(label, len(runs), steps, sqrt_kl, gold, proxy, _fit(sqrt_kl, gold, form))


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and the half-width of its 95 % t-interval; None for a single seed."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    t = float(np.interp(1 / (len(x) - 1), 1 / np.array(DEGREES), STUDENT))  # Student's 97.5 % point
    return float(x.mean()), t * float(x.std(ddof=1)) / math.sqrt(len(x))


def place(record: Record) -> int:
    """Return where on its curve a record stands: its step, or its n for best-of-n."""
    return int(record["n"] if "n" in record else record["step"])


def scale(records: Sequence[Record], name: str) -> float | None:
    """Return the spread that standardised `name`, recovered from the two records that lie furthest apart."""
    known = sorted((r[f"{name}_z"], r[name]) for r in records if r.get(f"{name}_z") is not None)
    if len(known) < 2 or not known[-1][0] > known[0][0]:
        return None
    return float((known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0]))


def _band(table: Sequence[Sequence[Record]], name: str) -> Band | None:
    z = np.array([[_number(record.get(f"{name}_z")) for record in run] for run in table])
    if not np.isfinite(z).any():
        return None
    if len(table) == 1:
        errors = np.array([_number(record.get(f"{name}_se")) for record in table[0]])
        half = NORMAL * errors / (scale(table[0], name) or math.nan)
        return Band(z[0], z[0] - half, z[0] + half)
    stats = [interval(column) for column in z.T.tolist()]
    middle, half = np.array(stats, np.float64).T
    return Band(middle, middle - half, middle + half)


def _fit(sqrt_kl: Floats, gold: Band | None, form: Form) -> ScalingLaw | None:
    """Fit the gold line where it has three points or more away from KL 0."""
    if gold is None:
        return None
    known = np.isfinite(gold.middle) & np.isfinite(sqrt_kl)
    x, y = sqrt_kl[known], gold.middle[known]
    if len(np.unique(x[x > 0])) < 3:
        return None
    return fit_scaling_law(x**2, y - y[0], form=form)


def _kl(record: Record) -> float:
    measured = record.get("kl_k1")
    return _number(record.get("kl_bound") if measured is None else measured)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Estimate:
    """A number, and the half-width of its 95 % interval over seeds where there are several.

    Args:
        value: mean over seeds.
        half: None for a single seed.
    """

    value: float
    half: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one method; a quantity that its records do not have is None.

    Args:
        label: name for people.
        seeds: runs behind it.
        peak_gold: gold at the peak less gold at the start, in standard deviations of the step-0 samples.
        final_gold: the same at the end.
        drop: share of the gain that was lost again; of several seeds, lost by all over gained by all.
        peak_kl: nats at the peak.
        final_kl: nats at the end.
        win_rate: at the end, against the reference's responses.
    """

    label: str
    seeds: int
    peak_gold: Estimate | None
    final_gold: Estimate | None
    drop: Estimate | None
    peak_kl: Estimate | None
    final_kl: Estimate | None
    win_rate: Estimate | None


def outcome(label: str, runs: Sequence[Sequence[Record]], samples: Sequence[Sequence[Record]]) -> Outcome:
    """Measure what the runs of one method gained and lost.

    The peak is chosen on one half of the prompts and measured on the other (`overoptimization_drop`) where the samples
    allow it; else it is the highest record, which flatters.

    Args:
        label: name for people.
        runs: S lists of probe records, each by rising step; S >= 1.
        samples: S lists of samples of the same runs; a list may be empty.
    """
    gains = [_gain(run, rows) for run, rows in zip(runs, samples, strict=True)]
    known = [gain for gain in gains if gain is not None]
    whole = known if len(known) == len(gains) else []
    return Outcome(
        label=label,
        seeds=len(runs),
        peak_gold=_estimate([gain for gain, _, _ in whole]),
        final_gold=_estimate([gain - fall for gain, fall, _ in whole]),
        drop=_share([(gain, fall) for gain, fall, _ in whole]),
        peak_kl=_estimate([kl for _, _, kl in whole]),
        final_kl=_estimate([_kl(run[-1]) for run in runs]),
        win_rate=_estimate([_number(run[-1].get("win_rate")) for run in runs]),
    )


def _gain(run: Sequence[Record], samples: Sequence[Record]) -> tuple[float, float, float] | None:
    """Gain, fall (standard deviations) and KL at the peak of one run."""
    spread = scale(run, "gold")
    if spread is None:
        return None
    gold = _by_prompt(run, samples)
    if gold is not None:
        drop = overoptimization_drop(gold, rng=np.random.default_rng(0))
        return drop.gain / spread, drop.fall / spread, float(np.mean([_kl(run[peak]) for peak in drop.peaks]))
    z = [_number(record.get("gold_z")) for record in run]
    best = int(np.nanargmax(z))
    return z[best] - z[0], z[best] - z[-1], _kl(run[best])


def _by_prompt(run: Sequence[Record], samples: Sequence[Record]) -> Floats | None:
    """Gold of every prompt at every record, [M, P]; None unless all are there, with two records and four prompts."""
    cells: dict[tuple[int, int], list[float]] = {}
    for row in samples:
        if row.get("gold") is not None:
            cells.setdefault((place(row), row["prompt_index"]), []).append(row["gold"])
    prompts = sorted({prompt for _, prompt in cells})
    grid = [[cells.get((place(record), prompt)) for prompt in prompts] for record in run]
    if len(run) < 2 or len(prompts) < 4 or any(cell is None for line in grid for cell in line):
        return None
    return np.array([[np.mean(cell or []) for cell in line] for line in grid])


def _share(gains: Sequence[tuple[float, float]]) -> Estimate | None:
    """Sum of falls over sum of gains, with the interval of a ratio of means (linearised)."""
    gained, lost = (float(sum(column)) for column in zip(*gains, strict=True)) if gains else (0.0, 0.0)
    if not gained > 0:
        return None
    share = lost / gained
    _, half = interval([fall - share * gain for gain, fall in gains])
    return Estimate(share, None if half is None else half * len(gains) / gained)


def _estimate(values: Sequence[float]) -> Estimate | None:
    return Estimate(*interval(values)) if len(values) and all(map(math.isfinite, values)) else None
