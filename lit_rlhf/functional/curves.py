"""Over-optimisation curves: probe records of the seeds of one method as lines with bands against sqrt(KL).

Legend: S seeds, R records of a seed, P prompts. Scores are in standard deviations of the step-0 samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_rlhf.errors import UserError
from lit_rlhf.functional.overoptimization import (
    DEGREES,
    STUDENT,
    Form,
    ScalingLaw,
    bootstrap_scaling_law,
    compare_forms,
    fit_scaling_law,
    overoptimization_drop,
)

Record = Mapping[str, Any]
Floats = NDArray[np.float64]
NORMAL = STUDENT[0]
RESAMPLES = 200  # a report of many methods stays quick


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
        fit: the law fitted to gold, relative to its first point, without intervals; None where it cannot be.
        bound: whether KL is best-of-n's analytic bound and was not measured.
    """

    label: str
    seeds: int
    steps: tuple[int, ...]
    sqrt_kl: Floats
    gold: Band | None
    proxy: Band | None
    fit: ScalingLaw | None
    bound: bool = False


def curve_of(label: str, runs: Sequence[Sequence[Record]]) -> Curve:
    """Average the runs of one method, one for each seed, at the steps that all of them have.

    Args:
        label: name for people.
        runs: S lists of records, each by rising step; S >= 1.
    """
    table = _table(runs)
    steps = tuple(place(record) for record in table[0])
    sqrt_kl = np.array([[math.sqrt(max(_kl(record), 0.0)) for record in run] for run in table]).mean(0)
    gold, proxy = (_band(table, name) for name in ("gold", "proxy"))
    points = _points(table)
    fit = None if points is None else fit_scaling_law(points.kl, points.gold, points.form, points.se)
    bound = all(record.get("kl_k1") is None and "n" in record for run in table for record in run)
    return Curve(label, len(runs), steps, sqrt_kl, gold, proxy, fit, bound)


@dataclass(frozen=True)
class Law:
    """A method's fitted law, and how well it and its rivals foretell a probe that they have not seen.

    Args:
        fit: with intervals where there are two seeds or the samples of all prompts.
        errors: form to root mean square error of the probes left out one step at a time, all seeds together, in
            standard deviations of the step-0 samples; empty where too few probes remain.
    """

    fit: ScalingLaw
    errors: dict[str, float]


def law_of(
    runs: Sequence[Sequence[Record]], samples: Sequence[Sequence[Record]], *, resamples: int = RESAMPLES, seed: int = 0
) -> Law | None:
    """Fit the law of `curve_of` with intervals, by resampling seeds and prompts (`bootstrap_scaling_law`).

    A probe weighs 1 / se^2, with the standard error that its record has for gold. Prompts are resampled where every
    seed has the samples of the same prompts at all probes; else seeds alone.

    Args:
        runs: S lists of probe records, each by rising step; S >= 1.
        samples: S lists of samples of the same runs; a list may be empty.
        resamples: how many; >= 100.
        seed: of the resamples.

    Returns:
        The law; None with fewer than three probes away from KL 0.
    """
    table = _table(runs)
    points = _points(table)
    if points is None:
        return None
    fit = fit_scaling_law(points.kl, points.gold, points.form, points.se)
    kl, gold = _prompt_points(points, samples) or (points.kl, points.gold)
    if gold.ndim == 3 or len(gold) > 1:
        fit = bootstrap_scaling_law(
            kl, gold, rng=np.random.default_rng(seed), form=points.form, se=points.se, resamples=resamples
        )
    return Law(fit, _errors(points))


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
    spread = float((known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0]))
    return spread if spread > 0 else None


def _band(table: Sequence[Sequence[Record]], name: str) -> Band | None:
    z = np.array([[_number(record.get(f"{name}_z")) for record in run] for run in table])
    if not np.isfinite(z).any():
        return None
    if len(table) == 1:
        # where all points are made of one set of samples, the error of the gain leaves out how prompts differ anyway
        errors = np.array([_number(r.get(f"{name}_gain_se", r.get(f"{name}_se"))) for r in table[0]])
        half = NORMAL * errors / (scale(table[0], name) or math.nan)
        return Band(z[0], z[0] - half, z[0] + half)
    stats = [interval(column) for column in z.T.tolist()]
    middle, half = np.array(stats, np.float64).T
    return Band(middle, middle - half, middle + half)


@dataclass(frozen=True)
class _Points:
    """What a law is fitted to: M probes that all seeds measured.

    Args:
        places: [M], steps, or n.
        kl: [S, M], nats.
        gold: [S, M], standard deviations above the first probe.
        se: [S, M], in the same unit; None where records lack it.
        spread: [S], what a standard deviation is in gold's own unit.
        form: of the law.
    """

    places: list[int]
    kl: Floats
    gold: Floats
    se: Floats | None
    spread: Floats
    form: Form


def _table(runs: Sequence[Sequence[Record]]) -> list[list[Record]]:
    """Records [S][R] at the steps that all runs have."""
    by_step = [{place(record): record for record in run} for run in runs]
    steps = sorted(set.intersection(*(set(run) for run in by_step)))
    return [[run[step] for step in steps] for run in by_step]


def _points(table: Sequence[Sequence[Record]]) -> _Points | None:
    """Take what is known to all seeds; None unless three probes or more stand at different KL > 0."""
    kl = np.array([[_kl(record) for record in run] for run in table])
    z = np.array([[_number(record.get("gold_z")) for record in run] for run in table])
    known = np.isfinite(kl).all(0) & np.isfinite(z).all(0)
    kl, z = kl[:, known], z[:, known]
    away = kl.mean(0)
    if len(np.unique(away[away > 0])) < 3:
        return None
    spread = np.array([scale(run, "gold") or math.nan for run in table])
    se = np.array([[_number(record.get("gold_se")) for record in run] for run in table])[:, known] / spread[:, None]
    places = [place(record) for record, keep in zip(table[0], known, strict=True) if keep]
    form: Form = "bon" if all("n" in record for run in table for record in run) else "rl"
    return _Points(places, kl, z - z[:, :1], _floored(se), spread, form)


def _floored(se: Floats) -> Floats | None:
    """Lift errors of 0, of probes where all prompts scored the same by chance, to the smallest of the others."""
    if not np.isfinite(se).all() or not (se > 0).any():
        return None
    return np.maximum(se, se[se > 0].min())


def _prompt_points(points: _Points, samples: Sequence[Sequence[Record]]) -> tuple[Floats, Floats] | None:
    """KL and gold of every prompt, [S, M, P] each (KL [S, M, 1] where samples lack it)."""
    prompts = [{row["prompt_index"]: row.get("prompt") for row in rows} for rows in samples]
    if not np.isfinite(points.spread).all() or any(those != prompts[0] for those in prompts):
        return None
    gold = [_by_prompt(points.places, rows, "gold") for rows in samples]
    if any(grid is None or grid.shape[1] < 2 for grid in gold):
        return None
    relative = [(g - g[0]) / unit for g, unit in zip(gold, points.spread, strict=True) if g is not None]
    kl = [grid for rows in samples if (grid := _by_prompt(points.places, rows, "kl_k1")) is not None]
    whole = len(kl) == len(gold) and all(k.shape == g.shape for k, g in zip(kl, relative, strict=True))
    return np.stack(kl) if whole else points.kl[..., None], np.stack(relative)


def _errors(points: _Points) -> dict[str, float]:
    try:
        return compare_forms(points.kl, points.gold, points.se, np.tile(points.places, len(points.kl)))
    except UserError:  # what is left without one step does not fix a fit
        return {}


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
        drop: share of the gain that was lost again, mean fall over mean gain of all seeds; None where the mean gain is
            within two standard errors of 0, since a ratio to nothing says nothing.
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
        peak_gold=_estimate([each.gain for each in whole]),
        final_gold=_estimate([each.gain - each.fall for each in whole]),
        drop=_share(whole),
        peak_kl=_estimate([each.peak_kl for each in whole]),
        final_kl=_estimate([_kl(run[-1]) for run in runs]),
        win_rate=_estimate([_number(run[-1].get("win_rate")) for run in runs]),
    )


class _Gain(NamedTuple):
    """One run: gain, fall and the gain's standard error (standard deviations), and nats at the peak."""

    gain: float
    fall: float
    error: float
    peak_kl: float


def _gain(run: Sequence[Record], samples: Sequence[Record]) -> _Gain | None:
    spread = scale(run, "gold")
    if spread is None:
        return None
    gold = _by_prompt([place(record) for record in run], samples, "gold")
    if gold is not None and gold.shape[1] >= 4:
        drop = overoptimization_drop(gold, rng=np.random.default_rng(0))
        peak_kl = float(np.mean([_kl(run[peak]) for peak in drop.peaks]))
        return _Gain(drop.gain / spread, drop.fall / spread, drop.gain_se / spread, peak_kl)
    z = [_number(record.get("gold_z")) for record in run]
    best = int(np.nanargmax(z))
    errors = [record.get("gold_se") or 0.0 for record in (run[0], run[best])]
    return _Gain(z[best] - z[0], z[best] - z[-1], math.hypot(*errors) / spread, _kl(run[best]))


def _by_prompt(places: Sequence[int], samples: Sequence[Record], name: str) -> Floats | None:
    """Mean of a score over each prompt's samples, [M, P]; None unless all are there, at two places or more.

    A sample that stands for many, as in best-of-n, brings their expectation as `NAME_expected`.
    """
    cells: dict[tuple[int, int], list[float]] = {}
    for row in samples:
        value = row.get(f"{name}_expected", row.get(name))
        if value is not None:
            cells.setdefault((place(row), row["prompt_index"]), []).append(value)
    prompts = sorted({prompt for _, prompt in cells})
    grid = [[cells.get((at, prompt)) for prompt in prompts] for at in places]
    if len(places) < 2 or not prompts or any(cell is None for line in grid for cell in line):
        return None
    return np.array([[sum(cell or []) / len(cell or [0]) for cell in line] for line in grid])


def _share(gains: Sequence[_Gain]) -> Estimate | None:
    """Mean fall over mean gain, with the t-interval over seeds of a ratio of means (linearised).

    None when the mean gain is within two of its standard errors: over prompts, or over seeds where that is larger.
    """
    if not gains:
        return None
    gain, fall = (float(np.mean([each[i] for each in gains])) for i in range(2))
    errors = [math.hypot(*(each.error for each in gains)) / len(gains)]
    if len(gains) > 1:
        errors.append(float(np.std([each.gain for each in gains], ddof=1)) / math.sqrt(len(gains)))
    if not gain > 2 * max(errors):
        return None
    share = fall / gain
    _, half = interval([each.fall - share * each.gain for each in gains])
    return Estimate(share, None if half is None else half / gain)


def _estimate(values: Sequence[float]) -> Estimate | None:
    return Estimate(*interval(values)) if len(values) and all(map(math.isfinite, values)) else None
