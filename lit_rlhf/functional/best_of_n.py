"""Best-of-n: what the best of n responses by a proxy is worth, for a whole grid of n from one set of N samples.

Legend: P prompts, N samples a prompt, G values of n. NumPy in float64, no torch. Samples are told apart by their index
and never by their text.

Ties by a stated rule: of responses with one proxy score each is as likely to be picked, and every estimate here is the
expectation over that draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_rlhf.errors import UserError

Floats = NDArray[np.float64]
Places = NDArray[np.intp]


@dataclass(frozen=True)
class BestOfNCurve:
    """What best-of-n by a proxy is expected to score with each prompt.

    Args:
        proxy: [G, P], the proxy's own score.
        gold: [G, P], the score that is believed.
    """

    proxy: Floats
    gold: Floats


@dataclass(frozen=True)
class Ranking:
    """The N samples of each prompt by rising score, and who ties with whom.

    Args:
        order: [P, N], sample numbers by rising score.
        below: [P, N], for each place in that order, how many samples score less.
        upto: [P, N], the same, how many score less or as much, itself included.
    """

    order: Places
    below: Places
    upto: Places

    @classmethod
    def of(cls, scores: ArrayLike) -> Self:
        """Rank scores [P, N].

        Raises:
            UserError: the scores are no [P, N] of finite numbers.
        """
        x = _scores("scores", scores)
        order = np.argsort(x, axis=1, kind="stable")
        ranked = np.take_along_axis(x, order, 1)
        place = np.arange(x.shape[1])
        new = np.diff(ranked, axis=1) > 0
        first, last = (np.pad(new, ((0, 0), pad), constant_values=True) for pad in ((1, 0), (0, 1)))
        below = np.maximum.accumulate(np.where(first, place, 0), axis=1)
        upto = np.minimum.accumulate(np.where(last, place + 1, x.shape[1])[:, ::-1], axis=1)[:, ::-1]
        return cls(order, below, upto)

    def expect(self, values: ArrayLike, ns: Sequence[int]) -> Floats:
        """Return the expected value of the response that best-of-n by these scores picks.

        E_n = sum_i C(i - 1, n - 1) / C(N, n) * v_i,    i = n .. N by rising score

        the mean over all subsets of n of the N samples, so unbiased for every n <= N (Nakano et al. 2021,
        arXiv:2112.09332, appendix). v_i is the mean value over the samples that tie at place i, which makes it the mean
        over all ways to break the ties as well.

        Args:
            values: [P, N], any quantity of the samples, in their own order.
            ns: [G], each in 1 .. N.

        Returns:
            [G, P].

        Raises:
            UserError: values of another shape or not finite, or an n outside its range.
        """
        v = _scores("values", values)
        if v.shape != self.order.shape:
            raise UserError(f"values must be [P, N] like the scores, {self.order.shape}, got {v.shape}")
        size = v.shape[1]
        ranked = np.take_along_axis(v, self.order, 1)
        group = (np.arange(len(v))[:, None] * size + self.below).ravel()
        sums = np.bincount(group, weights=ranked.ravel(), minlength=v.size)
        tied = (sums[group] / (self.upto - self.below).ravel()).reshape(v.shape)
        return _weights(ns, size) @ tied.T


def best_of_n(proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int]) -> BestOfNCurve:
    """Estimate proxy and gold of best-of-n for a grid of n; see `Ranking.expect` for equation, source and ties.

    Args:
        proxy: [P, N], what responses are picked by.
        gold: [P, N], of the same samples in the same order.
        ns: [G], each in 1 .. N.

    Returns:
        Expectations, [G, P] each.

    Raises:
        UserError: shapes differ, a score is not finite, or an n is outside its range.

    Examples:
        >>> best_of_n([[1.0, 3.0, 2.0]], [[10.0, 0.0, 5.0]], [1, 2, 3]).gold.ravel().round(4).tolist()
        [5.0, 1.6667, 0.0]
    """
    ranking = Ranking.of(proxy)
    return BestOfNCurve(ranking.expect(proxy, ns), ranking.expect(gold, ns))


def best_of_n_weights(n: int, total: int) -> Floats:
    """Return the chance of each place, by rising score, to be the best of n drawn from `total` without replacement.

    w_i = C(i - 1, n - 1) / C(N, n) for i >= n, else 0; in log space by lgamma.

    Args:
        n: in 1 .. total.
        total: N.

    Returns:
        [N], summing to 1.

    Raises:
        UserError: n is outside its range.
    """
    return np.asarray(_weights([n], total)[0])


def kl_bound(n: int) -> float:
    """Return log n - (n - 1) / n, nats: an upper bound of KL(best-of-n || policy).

    It is reached where no two responses ever tie and none has mass of its own; for discrete responses the KL is smaller
    (Beirami et al. 2024, arXiv:2401.01879). The formula is the usual axis, Gao et al. 2022, arXiv:2210.10760.

    Raises:
        UserError: n < 1.
    """
    if n < 1:
        raise UserError(f"n must be >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def empirical_kl(proxy: ArrayLike, ns: Sequence[int]) -> Floats:
    """Return the exact KL of best-of-n against the policy that draws one of the N samples at random.

    KL_n = sum_g m_g log(m_g / p_g),    m_g = F_g^n - F_(g-1)^n

    over groups g of equal score, with p_g the group's share of the samples and F_g the share that scores no more. It is
    exact for that policy, whose n draws are with replacement. It is the policy's own KL where the N samples show how
    often each response comes (small discrete tasks), and never above `kl_bound`, which samples without ties undercut by
    little: by log N - 1.04 against log N - 1 at n = N, by less for smaller n. Which responses share a group does
    not matter, since ties are broken at random.

    Args:
        proxy: [P, N].
        ns: [G], each >= 1.

    Returns:
        [G, P], nats.

    Raises:
        UserError: scores of another shape or not finite, or n < 1.
    """
    ranking, size = Ranking.of(proxy), np.shape(proxy)[1]
    share = (ranking.upto - ranking.below) / size
    with np.errstate(divide="ignore"):
        log_below, log_upto = np.log(ranking.below / size), np.log(ranking.upto / size)
    found = []
    for n in ns:
        kl_bound(n)  # refuses n < 1
        log_mass = n * log_upto + np.log(-np.expm1(n * (log_below - log_upto)))
        # each place of a group carries its part of the group's term
        found.append((np.exp(log_mass) * (log_mass - np.log(share)) / share).mean(1))
    return np.maximum(np.stack(found), 0)  # a KL of nothing may round below it


def win_shares(gold: ArrayLike) -> Floats:
    """Return the chance that each sample beats one more draw of the policy, ties half.

    w = (samples with less gold + half of those with as much, itself included, + 1/2) / (N + 1)

    A new draw falls with equal chance into each of the N + 1 gaps that N samples leave. Averaged over samples it is
    1/2, and best-of-n by gold itself reaches n / (n + 1), the most that best-of-n can reach.

    Args:
        gold: [P, N].

    Returns:
        [P, N], in (0, 1).

    Raises:
        UserError: scores of another shape or not finite.
    """
    ranking = Ranking.of(gold)
    ranked = (ranking.below + ranking.upto + 1) / (2 * (np.shape(gold)[1] + 1))
    found = np.empty_like(ranked)
    np.put_along_axis(found, ranking.order, ranked, 1)
    return found


def prompt_intervals(
    curve: ArrayLike, *, rng: np.random.Generator, resamples: int = 1000, level: float = 0.95
) -> Floats:
    """Return percentile intervals of a curve's mean over prompts, from prompts drawn with replacement.

    All points are resampled together, as they are made of the same samples.

    Args:
        curve: [G, P].
        rng: source of the resamples.
        resamples: how many; >= 100.
        level: share that an interval covers, in (0, 1).

    Returns:
        [G, 2], low and high; both NaN for a single prompt.

    Raises:
        UserError: a curve of another shape or not finite, or too few resamples.
    """
    values = _scores("curve", curve)
    if resamples < 100:
        raise UserError(f"resamples must be >= 100, got {resamples}")
    size = values.shape[1]
    if size < 2:
        return np.full((len(values), 2), np.nan)
    means = rng.multinomial(size, np.full(size, 1 / size), size=resamples) / size @ values.T
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def _weights(ns: Sequence[int], total: int) -> Floats:
    """Weights [G, N] of the places by rising score."""
    for n in ns:
        if not 1 <= n <= total:
            raise UserError(f"n must be in 1 .. {total}, the number of samples, got {n}")
    log_factorial = np.array([math.lgamma(k + 1) for k in range(total + 1)])
    before = np.arange(total)  # samples below each place
    weights = np.zeros((len(ns), total))
    for row, n in zip(weights, ns, strict=True):
        top = before[n - 1 :]
        log_choices = log_factorial[top] - log_factorial[n - 1] - log_factorial[top - n + 1]
        log_subsets = log_factorial[total] - log_factorial[n] - log_factorial[total - n]
        row[n - 1 :] = np.exp(log_choices - log_subsets)
    return weights


def _scores(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.size == 0:
        raise UserError(f"{name} must be [prompts, samples] with at least one of each, got shape {array.shape}")
    if not np.isfinite(array).all():
        prompt, sample = np.argwhere(~np.isfinite(array))[0].tolist()
        raise UserError(
            f"{name} must be finite, got {array[prompt, sample]} for prompt {prompt}, sample {sample} (from 0)"
        )
    return array
