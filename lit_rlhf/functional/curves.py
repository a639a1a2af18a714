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

from lit_rlhf.functional.overoptimization import Form, ScalingLaw, fit_scaling_law

Record = Mapping[str, Any]
Floats = NDArray[np.float64]
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; the normal's beyond the table is 2 % too small at most
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
NORMAL = 1.96


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
    t = _T[len(x) - 2] if len(x) - 2 < len(_T) else NORMAL
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
