"""Nelder-Mead that asks for one point at a time, for scores that take a stretch of training each.

Legend: D axes, one for each threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Evaluation = tuple[Sequence[float], float]


class _UnrecordedError(Exception):
    """Carries the first point that nobody has scored."""

    def __init__(self, point: np.ndarray) -> None:
        super().__init__("no score yet")
        self.point = point


def propose(
    evaluations: Sequence[Evaluation], simplex: Sequence[Sequence[float]], tolerance: Sequence[float]
) -> tuple[float, ...] | None:
    """Return the next point at which a score is wanted, in search of the highest score.

    SciPy's Nelder-Mead (reflection 1, expansion 2, contraction and shrinkage 1/2) runs from the start over the scores
    known so far and stops at the first point without one. There is no state but `evaluations`, so that a resumed
    search goes on as the uninterrupted one.

    Source: Nelder and Mead 1965, The Computer Journal 7(4); over thresholds within one run, Moskovitz et al. 2023,
    arXiv:2310.04373.

    Departures: the paper's listing minimises; scores are negated inside. Of several known points within the tolerance
    the earliest gives its score, so that later evaluations never change earlier decisions.

    Args:
        evaluations: points as proposed [D] with their scores (higher is better), oldest first; other points may be
            among them.
        simplex: [D + 1, D], the points to start with; they must span all D axes.
        tolerance: [D], in each axis' own units, > 0: a point no further than this on every axis from a known one
            shares its score, and the search ends when all points of the simplex are that close to the best.

    Returns:
        the point, or None when the search has ended (or after 200 D points, known ones included).

    Raises:
        ValueError: the shapes do not fit, the simplex is flat, or a number is out of range.
    """
    from scipy.optimize import minimize

    scale, vertices = np.asarray(tolerance, np.float64), np.asarray(simplex, np.float64)
    _check(scale, vertices)
    points, scores = _recorded(evaluations, len(scale))

    def cost(scaled: np.ndarray) -> float:
        near = np.flatnonzero((np.abs(points / scale - scaled) <= 1).all(1))
        if not near.size:
            raise _UnrecordedError(scaled * scale)
        return -float(scores[near[0]])

    # In units of the tolerance, which the moves of the simplex do not notice, one number ends the search for all axes.
    options = {"initial_simplex": vertices / scale, "xatol": 1.0, "fatol": np.inf}
    try:
        minimize(cost, vertices[0] / scale, method="Nelder-Mead", options=options)
    except _UnrecordedError as missing:
        return tuple(missing.point.tolist())
    return None


def right_simplex(corner: Sequence[float], steps: Sequence[float]) -> list[list[float]]:
    """Return the corner and its neighbours, one step along each axis, as [D + 1, D].

    >>> right_simplex([1.0, 2.0], [0.5, -0.5])
    [[1.0, 2.0], [1.5, 2.0], [1.0, 1.5]]
    """
    origin = np.asarray(corner, np.float64)
    return np.vstack([origin, origin + np.diag(np.asarray(steps, np.float64))]).tolist()


def _check(scale: np.ndarray, vertices: np.ndarray) -> None:
    axes = len(scale) if scale.ndim == 1 else 0
    if axes == 0 or vertices.shape != (axes + 1, axes):
        raise ValueError(f"tolerance [D] and simplex [D + 1, D] do not fit: {scale.shape} and {vertices.shape}")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"tolerance must be > 0 and finite on every axis, got {scale.tolist()}")
    if not np.isfinite(vertices).all() or np.linalg.matrix_rank((vertices[1:] - vertices[0]) / scale) < axes:
        raise ValueError(f"the simplex must span all {axes} axes, got {vertices.tolist()}")


def _recorded(evaluations: Sequence[Evaluation], axes: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = {len(point) for point, _ in evaluations} - {axes}
    if lengths:
        raise ValueError(f"points must have {axes} axes, got {lengths.pop()}")
    points = np.array([point for point, _ in evaluations], np.float64).reshape(-1, axes)
    scores = np.array([score for _, score in evaluations], np.float64)
    if not (np.isfinite(points).all() and np.isfinite(scores).all()):
        raise ValueError(f"points and scores must be finite, got {list(evaluations)}")
    return points, scores
