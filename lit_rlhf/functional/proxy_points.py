"""Proxy points: how far to push each reward before gold falls, from pairs of reward values and gold.

Legend: N measured points, D rewards, M places asked about. NumPy in float64.

Source: Moskovitz et al. 2023, arXiv:2310.04373, section 4: the value of one reward at the peak of gold, or the top of a
polynomial surface over the values of several, where points are dense.
To add a surface: a class here, and a row in the table of `tests/functional/test_proxy_surfaces.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import ArrayLike, NDArray

from lit_rlhf.errors import UserError

Floats = NDArray[np.float64]
PLACES = 13  # 2^13 places are asked about


class ProxyPoint(NamedTuple):
    """Where a surface is highest.

    Attributes:
        values: [D], of the rewards.
        gold: what the surface says there.
        sd: how sure it is, a standard deviation of the mean; None where it cannot say.
        density: of the points there, as a share of the densest measured point's.
    """

    values: tuple[float, ...]
    gold: float
    sd: float | None
    density: float


class Surface(ABC):
    """Gold as a smooth function of reward values; children are frozen."""

    pessimism: float = 0.0

    @abstractmethod
    def predict(self, points: Floats, gold: Floats, places: Floats) -> tuple[Floats, Floats | None]:
        """Fit [N, D] and [N], and return mean and its standard deviation (or None) at [M, D], [M] each."""


@dataclass(frozen=True)
class Polynomial(Surface):
    """Least squares with all products of Legendre polynomials up to a total degree.

    Departure from the paper, which takes degree 10 whatever the number of points: the degree falls until there are at
    least three points a coefficient.

    Args:
        degree: at most; >= 1.
    """

    degree: int = 10

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if self.degree < 1:
            raise UserError(f"Polynomial: degree must be >= 1, got {self.degree}")

    def used(self, count: int, axes: int) -> int:
        """Return the degree that N points on D axes allow."""
        return max(d for d in range(self.degree + 1) if d == 0 or 3 * math.comb(axes + d, axes) <= count)

    def predict(self, points: Floats, gold: Floats, places: Floats) -> tuple[Floats, None]:
        """Fit and evaluate; axes are scaled to [-1, 1] over the points."""
        low, high = points.min(0), points.max(0)
        degree = self.used(*points.shape)
        fitted, *_ = np.linalg.lstsq(_terms((2 * points - low - high) / (high - low), degree), gold, rcond=None)
        return _terms((2 * places - low - high) / (high - low), degree) @ fitted, None


@dataclass(frozen=True)
class GaussianProcess(Surface):
    """Gaussian process with a squared exponential kernel, one length an axis, and equal noise, after SciPy.

    k(x, x') = s^2 exp(-sum_d (x_d - x'_d)^2 / (2 l_d^2)) + noise^2 [x = x']

    Lengths, scale and noise maximise the marginal likelihood (Rasmussen and Williams 2006, eqs. 2.25, 2.26 and 5.8).
    Unlike a polynomial it knows where it has seen nothing. The cost is that of N^3, seconds at a few hundred points.

    Args:
        pessimism: the top is where mean - pessimism x standard deviation is highest; >= 0.
    """

    pessimism: float = 1.0

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        if not self.pessimism >= 0:
            raise UserError(f"GaussianProcess: pessimism must be >= 0, got {self.pessimism}")

    def predict(self, points: Floats, gold: Floats, places: Floats) -> tuple[Floats, Floats]:
        """Fit and evaluate; axes and gold are standardised over the points."""
        from scipy.linalg import cho_factor, cho_solve
        from scipy.optimize import minimize

        x, y, at = points / points.std(0), (gold - gold.mean()) / _spread(gold), places / points.std(0)

        def solved(log: Floats) -> tuple[tuple[Floats, bool], Floats]:
            noise = math.exp(2 * log[-1]) + 1e-8
            factor = cho_factor(_kernel(x, x, log) + noise * np.eye(len(x)), lower=True)
            return factor, cho_solve(factor, y)

        def cost(log: Floats) -> float:
            factor, weights = solved(log)
            return float(y @ weights / 2 + np.log(np.diag(factor[0])).sum())

        axes = points.shape[1]
        bounds = [(-3.0, 4.0)] * axes + [(-3.0, 3.0), (-6.0, 1.0)]
        starts = [np.array([length] * axes + [0.0, noise]) for length in (0.0, 1.0) for noise in (-0.7, -2.0)]
        best = min((minimize(cost, start, method="L-BFGS-B", bounds=bounds) for start in starts), key=lambda r: r.fun)
        factor, weights = solved(best.x)
        cross = _kernel(at, x, best.x)
        variance = math.exp(2 * best.x[-2]) - (cross * cho_solve(factor, cross.T).T).sum(1)
        mean = gold.mean() + _spread(gold) * (cross @ weights)
        return mean, _spread(gold) * np.sqrt(np.maximum(variance, 0.0))


def joint_point(points: ArrayLike, gold: ArrayLike, surface: Surface, *, dense: float = 0.1) -> ProxyPoint:
    """Return the values of several rewards at which gold is highest, among places that policies have been to.

    Places are looked at where a Gaussian kernel density of the points is no lower than at all but a share of the points
    themselves. The paper's threshold is 50 points a unit square, which is one of its own units alone.

    Args:
        points: [N, D], values of the rewards.
        gold: [N].
        surface: gold over them.
        dense: share of the points, those at the rim, that do not count as dense, in [0, 1).

    Raises:
        UserError: too few points, numbers that are not finite, or rewards that move as one.
    """
    from scipy.stats import gaussian_kde, qmc

    x, y = np.asarray(points, np.float64), np.asarray(gold, np.float64)
    _check(x, y, dense)
    try:
        density = gaussian_kde(x.T)
    except np.linalg.LinAlgError as error:
        raise UserError("the rewards move as one: their values lie on a line, so they have no joint point") from error
    unit = qmc.Sobol(x.shape[1], scramble=False).random_base2(PLACES)
    places = np.vstack([x, x.min(0) + unit * (x.max(0) - x.min(0))])
    own, there = density(x.T), density(places.T)
    places, there = places[keep := there >= np.quantile(own, dense)], there[keep]
    mean, sd = surface.predict(x, y, places)
    top = int(np.argmax(mean if sd is None else mean - surface.pessimism * sd))
    uncertainty = None if sd is None else float(sd[top])
    return ProxyPoint(tuple(places[top].tolist()), float(mean[top]), uncertainty, float(there[top] / own.max()))


def individual_point(values: ArrayLike, gold: ArrayLike) -> tuple[int, float, float]:
    """Return the peak of gold over the probes of a run on one reward: its number, the reward's value, and gold.

    Args:
        values: [R], of the reward, or [S, R] for S seeds, which are averaged first.
        gold: the same shape.

    Raises:
        UserError: the shapes do not fit, or a number is not finite.
    """
    x, y = (np.atleast_2d(np.asarray(a, np.float64)) for a in (values, gold))
    if x.shape != y.shape or x.ndim != 2 or not x.size or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError(f"values and gold must be finite and [S, R], got {x.shape} and {y.shape}")
    top = int(np.argmax(y.mean(0)))
    return top, float(x[:, top].mean()), float(y[:, top].mean())


def _check(x: Floats, y: Floats, dense: float) -> None:
    if x.ndim != 2 or x.shape[1] < 2 or y.shape != x.shape[:1] or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError(f"points must be finite and [N, D] with D >= 2, gold [N], got {x.shape} and {y.shape}")
    if len(x) < 6 * x.shape[1]:
        raise UserError(f"a joint point of {x.shape[1]} rewards needs {6 * x.shape[1]} probes or more, got {len(x)}")
    if not 0 <= dense < 1:
        raise UserError(f"dense must be in [0, 1), got {dense}")
    if not (np.ptp(x, axis=0) > 0).all():
        raise UserError("a reward has one value in all probes, so it has no proxy point")


def _terms(x: Floats, degree: int) -> Floats:
    axes = [legendre.legvander(column, degree) for column in x.T]
    powers = [p for p in product(range(degree + 1), repeat=len(axes)) if sum(p) <= degree]
    return np.stack([np.prod([axis[:, k] for axis, k in zip(axes, p, strict=True)], axis=0) for p in powers], 1)


def _kernel(x: Floats, other: Floats, log: Floats) -> Floats:
    from scipy.spatial.distance import cdist

    lengths = np.exp(log[:-2])
    return np.asarray(np.exp(2 * log[-2] - cdist(x / lengths, other / lengths, "sqeuclidean") / 2))


def _spread(values: Floats) -> float:
    return float(values.std()) or 1.0
