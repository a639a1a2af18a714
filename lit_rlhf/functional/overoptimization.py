"""Over-optimisation measured: scaling laws with intervals, the peak, what is lost after it, the gap to the proxy.

Legend: M points of a curve (probes), R curves (seeds), P prompts. Everywhere d = sqrt(KL), KL in nats per response, and
gold is relative to the step-0 policy in any unit; alpha and beta are in that unit per sqrt(nat) (beta of "bon": per
nat). NumPy in float64, no torch.

Forms, Gao, Schulman and Hilton 2022, arXiv:2210.10760:

rl:   R(d) = d (alpha - beta log d)    peak d = exp(alpha / beta - 1), R = beta d            if beta > 0
bon:  R(d) = d (alpha - beta d)        peak d = alpha / (2 beta), R = alpha^2 / (4 beta)     if alpha, beta > 0

and R = 0 at KL 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_rlhf.errors import UserError

Floats = NDArray[np.float64]
Form = Literal["rl", "bon"]
Interval = tuple[float, float]

# 97.5 % points of Student's t; between them linear in 1 / degrees of freedom, which errs to the wide side
DEGREES = (math.inf, 30.0, 20.0, 10.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0)
STUDENT = (1.9600, 2.0423, 2.0860, 2.2281, 2.3646, 2.5706, 2.7764, 3.1824, 4.3027, 12.7062)


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted gold curve, its peak, and 95 % intervals where they were bootstrapped.

    Args:
        alpha: gold per sqrt(nat).
        beta: gold per sqrt(nat), over log d or d.
        peak_kl: nats; None when the curve has no peak.
        peak_gold: gold there; None when the curve has no peak.
        rmse: of the points with KL > 0, unweighted, in gold's unit.
        extrapolated: whether the peak lies outside the KL range of the points.
        form: "rl" or "bon".
        alpha_interval: None without a bootstrap, as below.
        beta_interval: as above.
        peak_kl_interval: None also when the fit has no peak; an end may be math.inf, when more resamples than the level
            leaves out rise without end.
        peak_gold_interval: the same.
        no_peak_share: share of resamples whose fit has no peak.
    """

    alpha: float
    beta: float
    peak_kl: float | None
    peak_gold: float | None
    rmse: float
    extrapolated: bool
    form: Form = "rl"
    alpha_interval: Interval | None = None
    beta_interval: Interval | None = None
    peak_kl_interval: Interval | None = None
    peak_gold_interval: Interval | None = None
    no_peak_share: float | None = None

    def predict(self, kl: ArrayLike) -> Floats:
        """Return the curve's gold at each KL (nats), 0 where KL <= 0, in the shape of `kl`."""
        return _features(_array("kl", kl), self.form) @ np.array([self.alpha, self.beta])


def fit_scaling_law(kl: ArrayLike, gold: ArrayLike, form: Form = "rl", se: ArrayLike | None = None) -> ScalingLaw:
    """Fit a scaling law by weighted least squares, without intercept, on features [d, -d log d] or [d, -d^2].

    A point at KL <= 0 (a k1 estimate may be negative) has features 0 and no say, whatever its gold and standard error.

    Args:
        kl: [M] or any shape, nats per response; at least two different values > 0.
        gold: the same shape, relative to the step-0 policy.
        form: "rl" or "bon".
        se: the same shape, standard errors of gold, > 0 where KL > 0; a point weighs 1 / se^2, or 1 when left out.

    Returns:
        The law, without intervals.

    Raises:
        UserError: an argument is outside its range, or there are too few points.
    """
    if form not in ("rl", "bon"):
        raise UserError(f"form must be 'rl' or 'bon', got {form!r}")
    x, y, weights = _points(kl, gold, se)
    features = _features(x, form)
    solution = _solved(features, y, weights)
    peak_kl, peak_gold = (float(value) for value in _peak(solution[..., 0], solution[..., 1], form))
    exists = bool(_exists(peak_kl, peak_gold))
    return ScalingLaw(
        alpha=float(solution[0]),
        beta=float(solution[1]),
        peak_kl=peak_kl if exists else None,
        peak_gold=peak_gold if exists else None,
        rmse=_rms((features @ solution - y)[x > 0]),
        extrapolated=exists and not x.min() <= peak_kl <= x.max(),
        form=form,
    )


def bootstrap_scaling_law(
    kl: ArrayLike,
    gold: ArrayLike,
    *,
    rng: np.random.Generator,
    form: Form = "rl",
    se: ArrayLike | None = None,
    resamples: int = 1000,
) -> ScalingLaw:
    """Fit a scaling law to the curves of R seeds, with 95 % intervals by resampling seeds and prompts.

    Each resample draws R of the seeds and P of the prompts with replacement (the same prompts at every point and for
    every seed, since all are measured on one set) and fits all points together. The intervals are percentiles of the
    resampled estimates, moved away from the estimate by the factor

    t(df) / t(inf) * sqrt(sum_c U_c / sum_c V_c),   U_c = V_c n_c / n'_c,   df = (sum_c U_c)^2 / sum_c U_c^2 / n'_c

    with V_c the variance from resampling n_c seeds alone and n_c prompts alone, n'_c = n_c - 1: plain percentiles of
    three seeds cover far less than 95 %. Peaks are treated in logarithms. A resample without a peak counts as a peak at
    infinity (beta <= 0, the limit of small beta) or at 0 (form "bon", alpha <= 0 < beta).

    Args:
        kl: [R, M] or [R, M, P], nats.
        gold: [R, M] or [R, M, P], relative to the step-0 policy (of the same prompt).
        rng: source of the resamples.
        form: "rl" or "bon".
        se: [R, M], as in `fit_scaling_law`.
        resamples: how many; >= 100.

    Returns:
        The law fitted to all points, with intervals and the share of resamples without a peak.

    Raises:
        UserError: as `fit_scaling_law`; or there are neither two seeds nor two prompts.
    """
    x, y = _curves(kl, gold)
    if resamples < 100:
        raise UserError(f"resamples must be >= 100, got {resamples}")
    law = fit_scaling_law(x.mean(-1), y.mean(-1), form, se)
    _, _, weights = _points(x.mean(-1), y.mean(-1), se)
    seeds, prompts = (_draws(rng, n, resamples) for n in (x.shape[0], x.shape[2]))
    estimates = _refit(x, y, weights, form, seeds, prompts)
    alone = [_refit(x, y, weights, form, seeds, None), _refit(x, y, weights, form, None, prompts)]
    widening = max(
        _widening([(float(np.var(e[i])), n) for e, n in zip(alone, (x.shape[0], x.shape[2]), strict=True)])
        for i in range(2)
    )
    alpha, beta = estimates
    peak_kl, peak_gold = _peak(alpha, beta, form)
    return replace(
        law,
        alpha_interval=_interval(law.alpha, alpha, widening),
        beta_interval=_interval(law.beta, beta, widening),
        peak_kl_interval=_log_interval(law.peak_kl, peak_kl, widening),
        peak_gold_interval=_log_interval(law.peak_gold, peak_gold, widening),
        no_peak_share=float(np.mean(~_exists(peak_kl, peak_gold))),
    )


def compare_forms(
    kl: ArrayLike, gold: ArrayLike, se: ArrayLike | None = None, groups: ArrayLike | None = None
) -> dict[str, float]:
    """Held-out error of three forms: each point is predicted by a fit to the others.

    "rl" and "bon" as above, "quadratic" is R = alpha KL - beta KL^2; all have two parameters and start at 0.

    Args:
        kl: [M], nats.
        gold: [M], relative to the step-0 policy.
        se: [M], as in `fit_scaling_law`; weighs the fits, not the errors.
        groups: [M], what is left out together, such as each point's beta or seed; single points when left out.

    Returns:
        Form to root mean square error over the points with KL > 0, in gold's unit; the smallest predicts best.

    Raises:
        UserError: what remains without one group does not fix a fit.
    """
    x, y, weights = _points(kl, gold, se)
    names = np.arange(x.size) if groups is None else np.asarray(groups).reshape(-1)
    if names.shape != x.shape:
        raise UserError(f"groups must have one entry a point, got {names.size} for {x.size}")
    errors: dict[str, float] = {}
    for form in ("rl", "bon", "quadratic"):
        features = _features(x, form)
        residuals = np.empty_like(y)
        for name in np.unique(names):
            out = names == name
            residuals[out] = features[out] @ _solved(features[~out], y[~out], weights[~out]) - y[out]
        errors[form] = _rms(residuals[x > 0])
    return errors


def detect_peak(gold: ArrayLike, se: ArrayLike | None = None, *, sigmas: float = 2.0, patience: int = 2) -> int | None:
    """Find the highest point of a measured curve that has surely turned; meant for a run in progress.

    It is a peak when at least `patience` points follow and each of the last `patience` lies below it by more than
    sigmas * sqrt(se_peak^2 + se_point^2). That is the error of independent points; probes on the same prompts differ by
    less, so the rule errs to the late side. Gold at the peak is biased upwards, `overoptimization_drop` is not.

    Args:
        gold: [M], in the order of measurement, any origin.
        se: [M], standard errors of gold, >= 0; 0 when left out, so that any fall counts.
        sigmas: how sure the fall must be; >= 0.
        patience: how many last points must agree; >= 1.

    Returns:
        The peak's index, 0 if the curve only fell; None while it rises, is flat within the noise, or is too short.
    """
    y = _array("gold", gold)
    noise = np.zeros_like(y) if se is None else _array("se", se)
    if y.ndim != 1 or y.shape != noise.shape or patience < 1 or not sigmas >= 0:
        raise UserError(
            f"gold and se must be [M], patience >= 1, sigmas >= 0, got {y.shape}, {noise.shape}, {patience}, {sigmas}"
        )
    top = int(np.argmax(y)) if y.size else 0
    if y.size - top <= patience:
        return None
    fallen = y[top] - y[-patience:] > sigmas * np.hypot(noise[top], noise[-patience:])
    return top if fallen.all() else None


@dataclass(frozen=True)
class Drop:
    """What a run gained and lost again, measured on prompts that did not choose the peak.

    Args:
        share: fall / gain; None when gain <= 2 gain_se: nothing was gained. Above 1 the end lies below the start.
        gain: gold at the peak less gold at the start.
        fall: gold at the peak less gold at the end; below 0 by noise alone when there was no fall.
        gain_se: standard error of `gain` over prompts.
        fall_se: standard error of `fall` over prompts.
        peaks: the point that each half of the prompts chose.
    """

    share: float | None
    gain: float
    fall: float
    gain_se: float
    fall_se: float
    peaks: tuple[int, int]


def overoptimization_drop(gold: ArrayLike, *, rng: np.random.Generator) -> Drop:
    """Measure the share of the gain that was lost after the peak.

    share = (peak - final) / (peak - start)

    The maximum of a noisy curve flatters, and a fall from it looks deeper than it is. So prompts are split in halves by
    chance; each half chooses its highest point, both differences are measured on the other half and averaged over all.

    Args:
        gold: [M, P], gold of every prompt (mean over its samples) at M points, the first at the start; M >= 2, P >= 4.
        rng: splits the prompts.

    Returns:
        The drop, in gold's unit.

    Raises:
        UserError: too few points or prompts, or a value is not finite.
    """
    values = _array("gold", gold)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 4:
        raise UserError(f"gold must be [M >= 2 points, P >= 4 prompts], got {values.shape}")
    order = rng.permutation(values.shape[1])
    halves = order[::2], order[1::2]
    peaks = int(np.argmax(values[:, halves[0]].mean(1))), int(np.argmax(values[:, halves[1]].mean(1)))
    at_peak = np.concatenate([values[peaks[0], halves[1]], values[peaks[1], halves[0]]])
    others = values[:, np.concatenate([halves[1], halves[0]])]
    differences = at_peak - others[[0, -1]]
    gain, fall = differences.mean(1).tolist()
    gain_se, fall_se = (differences.std(1, ddof=1) / math.sqrt(values.shape[1])).tolist()
    return Drop(fall / gain if gain > 2 * gain_se else None, gain, fall, gain_se, fall_se, peaks)


def proxy_gap(proxy_z: float | None, gold_z: float | None) -> float | None:
    """Proxy less gold, both in step-0 standard deviations: positive when over-optimised, None where one is missing."""
    return None if proxy_z is None or gold_z is None else proxy_z - gold_z


def _array(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise UserError(f"{name} must be finite everywhere, got {array[~np.isfinite(array)][0]}")
    return array


def _points(kl: ArrayLike, gold: ArrayLike, se: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    """Check and flatten to KL, gold and weights, [M] each."""
    x, y = _array("kl", kl), _array("gold", gold)
    noise = np.ones_like(x) if se is None else _array("se", se)
    if not x.shape == y.shape == noise.shape:
        raise UserError(f"kl, gold and se must have one shape, got {x.shape}, {y.shape} and {noise.shape}")
    if not (noise[x > 0] > 0).all():
        raise UserError(f"se must be > 0 wherever kl > 0, got {noise[x > 0].min()}")
    # a step-0 point often has standard error 0; it has no say in the fit, so its weight may be anything finite
    weights = np.where(x > 0, noise, 1.0) ** -2
    return x.ravel(), y.ravel(), weights.ravel()


def _curves(kl: ArrayLike, gold: ArrayLike) -> tuple[Floats, Floats]:
    """Check and bring to [R, M, P] each."""
    x, y = (a[..., None] if a.ndim == 2 else a for a in (_array("kl", kl), _array("gold", gold)))
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2] or x.shape[2] not in (1, y.shape[2]):
        raise UserError(f"kl and gold must be [R, M] or [R, M, P], got {np.shape(kl)} and {np.shape(gold)}")
    if y.shape[0] == 1 and y.shape[2] == 1:
        raise UserError("a bootstrap needs at least two seeds or two prompts, got one of each")
    return np.broadcast_to(x, y.shape), y


def _features(kl: Floats, form: str) -> Floats:
    """[..., 2] from [...], the factors of alpha and beta; 0 where KL <= 0."""
    d = np.sqrt(np.maximum(kl, 0))
    if form == "rl":
        return np.stack([d, -d * np.log(np.where(d > 0, d, 1))], -1)
    return np.stack([d, -(d**2)], -1) if form == "bon" else np.stack([d**2, -(d**4)], -1)


def _solve(features: Floats, gold: Floats, weights: Floats) -> Floats:
    """Weighted least squares [..., 2] from [..., M, 2], [..., M] and [..., M]; NaN where the points do not fix it."""
    normal = np.einsum("...mi,...m,...mj->...ij", features, weights, features)
    right = np.einsum("...mi,...m,...m->...i", features, weights, gold)
    (a, b), (_, c) = np.moveaxis(normal, (-2, -1), (0, 1))
    determinant = a * c - b**2
    determinant = np.where(determinant > 1e-12 * a * c, determinant, np.nan)
    solution = [c * right[..., 0] - b * right[..., 1], a * right[..., 1] - b * right[..., 0]]
    return np.stack(solution, -1) / determinant[..., None]


def _solved(features: Floats, gold: Floats, weights: Floats) -> Floats:
    solution = _solve(features, gold, weights)
    if np.isnan(solution).any():
        raise UserError("a fit needs at least two different values of kl > 0")
    return solution


def _peak(alpha: Floats, beta: Floats, form: Form) -> tuple[Floats, Floats]:
    """KL and gold at the peak; infinite where the curve rises without end, 0 where it never rises."""
    safe = np.where(beta > 0, beta, np.nan)
    with np.errstate(over="ignore"):
        d = np.exp(alpha / safe - 1) if form == "rl" else np.maximum(alpha, 0) / (2 * safe)
        gold = safe * d if form == "rl" else safe * d**2
        return np.where(beta > 0, d**2, np.inf), np.where(beta > 0, gold, np.inf)


def _exists(peak_kl: ArrayLike, peak_gold: ArrayLike) -> NDArray[np.bool_]:
    return np.greater(peak_kl, 0) & np.isfinite(peak_kl) & np.isfinite(peak_gold)


def _draws(rng: np.random.Generator, n: int, resamples: int) -> Floats:
    """[resamples, n], how often each of n was drawn, over n."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


def _refit(
    kl: Floats, gold: Floats, weights: Floats, form: Form, seeds: Floats | None, prompts: Floats | None
) -> Floats:
    """Refit resamples: alpha and beta, [2, resamples], each row of draws being one; no draws means all, once."""
    count = len(seeds) if seeds is not None else len(prompts) if prompts is not None else 1
    seeds = np.ones((count, kl.shape[0])) if seeds is None else seeds
    prompts = np.full((count, kl.shape[2]), 1 / kl.shape[2]) if prompts is None else prompts
    x, y = (np.tensordot(prompts, a, axes=(1, 2)).reshape(count, -1) for a in (kl, gold))
    found = _solve(_features(x, form), y, np.repeat(seeds, kl.shape[1], axis=1) * weights)
    return found[np.isfinite(found).all(1)].T


def _widening(components: list[tuple[float, int]]) -> float:
    """Factor on percentile intervals from each source's variance and number; see `bootstrap_scaling_law`."""
    found = [(v, v * n / (n - 1), n - 1) for v, n in components if n > 1]
    raw, corrected = sum(v for v, _, _ in found), sum(v for _, v, _ in found)
    if raw == 0:
        return 1.0
    inverse_df = sum(v**2 / df for _, v, df in found) / corrected**2
    student = float(np.interp(inverse_df, 1 / np.array(DEGREES), STUDENT))
    return student / STUDENT[0] * math.sqrt(corrected / raw)


def _interval(estimate: float, resampled: Floats, widening: float) -> Interval:
    low = float(np.quantile(resampled, 0.025, method="lower"))
    high = float(np.quantile(resampled, 0.975, method="higher"))
    return estimate + widening * (low - estimate), estimate + widening * (high - estimate)


def _log_interval(estimate: float | None, resampled: Floats, widening: float) -> Interval | None:
    if estimate is None:
        return None
    with np.errstate(divide="ignore", over="ignore"):
        low, high = np.exp(_interval(math.log(estimate), np.log(resampled), widening))
    return float(low), float(high)


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))
