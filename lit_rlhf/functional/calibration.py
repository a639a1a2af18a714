"""How often a preference model is right, how sure that number is, and whether the model knows: reliability and Brier.

Legend: N pairs, P prompts (the clusters), G groups. A pair's margin is the chosen response's score less the rejected
one's, its label the probability that `chosen` is the better one: 1 unless labels are soft. The model says
sigmoid(margin) for it, so calibration takes margins of raw scores: a Bradley-Terry model's logits. NumPy in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_rlhf.functional.probe_stats import clustered_mean

Floats = NDArray[np.float64]
NORMAL = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Proportion:
    """A share with its 95 % interval.

    Args:
        value: in [0, 1].
        low: lower end.
        high: upper end.
        n: pairs behind it.
        clusters: prompts behind it.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of like confidence.

    Args:
        confidence: mean probability that the model gives to the response it prefers, in [0.5, 1].
        accuracy: how often that response is the better one.
    """

    confidence: float
    accuracy: Proportion


def sigmoid(margin: ArrayLike) -> Floats:
    """Return 1 / (1 + exp(-margin)) without overflow, [N]."""
    x = np.asarray(margin, np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1 + small)


def agreement(margin: ArrayLike, label: ArrayLike) -> Floats:
    """How right the sign of each margin is: the label where it is positive, 1 - label where negative, half at 0.

    Args:
        margin: [N], chosen less rejected.
        label: [N] in [0, 1].

    Returns:
        [N] in [0, 1]; 1, 0 or 1/2 where labels are hard.
    """
    m, y = np.asarray(margin, np.float64), np.asarray(label, np.float64)
    return np.where(m > 0, y, np.where(m < 0, 1 - y, 0.5))


def proportion(values: ArrayLike, clusters: ArrayLike) -> Proportion:
    """Mean of values in [0, 1] with Wilson's interval, when values of one cluster may move together.

    centre, half = (p + z^2 / 2m) / (1 + z^2 / m),  z sqrt(p (1 - p) / m + z^2 / 4m^2) / (1 + z^2 / m)

    with z = 1.96 and m = N / max(1, deff), deff the cluster-robust variance of the mean over its variance without
    clusters. Wilson (1927) at the effective sample size, as Franco, Little, Louis and Slud (2019) find best for
    clustered proportions. Where all values are equal, or there is one cluster, no deff can be estimated and m = P.
    With one value for each cluster and values of 0 and 1 it is Wilson's own interval; values between make it too wide.

    Args:
        values: [N] in [0, 1], N >= 1.
        clusters: [N], integers that name the cluster of each value.
    """
    x = np.asarray(values, np.float64)
    names = np.unique(np.asarray(clusters))
    p, error = clustered_mean(x, clusters)
    _, plain = clustered_mean(x, np.arange(len(x)))
    m = float(len(names))
    if error is not None and plain:
        m = len(x) / max(1.0, (error / plain) ** 2)
    share = NORMAL**2 / m
    centre = (p + share / 2) / (1 + share)
    half = NORMAL * math.sqrt(p * (1 - p) / m + share / (4 * m)) / (1 + share)
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return Proportion(p, min(low, p), max(high, p), len(x), len(names))  # rounding may not put the share outside


def macro_average(groups: Sequence[Proportion]) -> Proportion:
    """Mean of G shares, each group counting the same, with an interval made of theirs.

    value - sqrt(sum_g (value_g - low_g)^2) / G,   value + sqrt(sum_g (high_g - value_g)^2) / G

    (Zou, Huang and Zhang 2009, for linear functions of independent proportions.)

    Args:
        groups: G >= 1 shares from different prompts.
    """
    value = sum(g.value for g in groups) / len(groups)
    below = math.hypot(*(g.value - g.low for g in groups)) / len(groups)
    above = math.hypot(*(g.high - g.value for g in groups)) / len(groups)
    count, clusters = sum(g.n for g in groups), sum(g.clusters for g in groups)
    return Proportion(value, max(value - below, 0.0), min(value + above, 1.0), count, clusters)


def reliability(margin: ArrayLike, label: ArrayLike, clusters: ArrayLike, bins: int = 10) -> list[ReliabilityBin]:
    """Group pairs by confidence sigmoid(|margin|), in equally wide bins over [0.5, 1]: how often is each bin right?

    Folding at 1/2 is what makes a curve of preference labels: `chosen` always comes first, so that sigmoid(margin)
    against label would be 1 in every bin. It equals the curve over both orders of every pair in 2 x bins bins.

    Args:
        margin: [N].
        label: [N].
        clusters: [N], prompt of each pair.
        bins: how many; empty ones are left out.
    """
    m, names = np.asarray(margin, np.float64), np.asarray(clusters)
    confidence, right = sigmoid(np.abs(m)), agreement(m, label)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        ReliabilityBin(float(confidence[place == b].mean()), proportion(right[place == b], names[place == b]))
        for b in np.unique(place)
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean distance of confidence and accuracy over pairs: sum_b N_b / N |accuracy_b - confidence_b|.

    Guo et al. (2017), arXiv:1706.04599, eq. 3. It is above 0 for a calibrated model too, the more so the fewer pairs
    there are in a bin.
    """
    total = sum(b.accuracy.n for b in bins)
    return sum(b.accuracy.n * abs(b.accuracy.value - b.confidence) for b in bins) / total


def brier(margin: ArrayLike, label: ArrayLike) -> Floats:
    """Return the squared error of each pair's probability, (sigmoid(margin) - label)^2, [N]; 1/4 where margin is 0.

    Brier (1950), for one of the two outcomes.
    """
    return np.square(sigmoid(margin) - np.asarray(label, np.float64))
