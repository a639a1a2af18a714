"""Best-of-n: against all subsets, by hand, at the published values, and what must hold whatever the scores."""

import itertools
import math
import time

import numpy as np
import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.functional.best_of_n import (
    best_of_n,
    best_of_n_weights,
    empirical_kl,
    kl_bound,
    prompt_intervals,
    win_shares,
)

RNG = np.random.default_rng(0)
DISTINCT = RNG.normal(size=(3, 7))
TIED = RNG.integers(0, 3, size=(4, 8)).astype(float)
EQUAL = np.zeros((2, 5))
each_proxy = pytest.mark.parametrize("proxy", [DISTINCT, TIED, EQUAL], ids=["distinct", "tied", "equal"])


def over_subsets(proxy, values, n):
    """Mean value of the picked response over every subset of n samples, and over the ties inside each."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if proxy[i] == best]))
    return np.mean(found)


@each_proxy
def test_it_is_the_mean_over_all_subsets_and_all_ways_to_break_ties(proxy):
    gold = RNG.normal(size=proxy.shape)
    ns = range(1, proxy.shape[1] + 1)
    curve = best_of_n(proxy, gold, ns)
    for g, n in enumerate(ns):
        expected = [over_subsets(p, v, n) for p, v in zip(proxy, gold, strict=True)]
        assert curve.gold[g].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)
        expected = [over_subsets(p, p, n) for p in proxy]
        assert curve.proxy[g].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_gold_follows_the_proxys_order():
    # by hand: of 1, 3, 2 the pairs pick 3, 2, 3; their gold is 0, 5, 0
    curve = best_of_n([[1.0, 3.0, 2.0]], [[10.0, 0.0, 5.0]], [1, 2, 3])
    assert curve.gold[:, 0].tolist() == pytest.approx([5, 5 / 3, 0], rel=1e-12, abs=1e-12)
    assert curve.proxy[:, 0].tolist() == pytest.approx([2, 8 / 3, 3], rel=1e-12)


def test_one_is_the_mean_and_all_is_the_best():
    gold = RNG.normal(size=DISTINCT.shape)
    curve = best_of_n(DISTINCT, gold, [1, DISTINCT.shape[1]])
    np.testing.assert_allclose(curve.gold[0], gold.mean(1), rtol=1e-12)
    np.testing.assert_allclose(curve.gold[1], gold[range(3), DISTINCT.argmax(1)], rtol=1e-12)
    np.testing.assert_allclose(curve.proxy[1], DISTINCT.max(1), rtol=1e-12)


@each_proxy
def test_the_order_of_samples_does_not_matter(proxy):
    gold, order = RNG.normal(size=proxy.shape), RNG.permutation(proxy.shape[1])
    one, other = best_of_n(proxy, gold, [1, 2, 4]), best_of_n(proxy[:, order], gold[:, order], [1, 2, 4])
    np.testing.assert_allclose(one.gold, other.gold, rtol=1e-12)
    np.testing.assert_allclose(empirical_kl(proxy, [2, 5]), empirical_kl(proxy[:, order], [2, 5]), rtol=1e-12)


def test_weights_by_hand_and_in_the_far_tail():
    assert best_of_n_weights(2, 4).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6], rel=1e-12)
    assert best_of_n_weights(1, 5).tolist() == pytest.approx([0.2] * 5, rel=1e-12)
    assert best_of_n_weights(5, 5).tolist() == pytest.approx([0, 0, 0, 0, 1], rel=1e-12)
    # lgamma near 1e5 keeps about eleven digits after the point
    assert abs(best_of_n_weights(12_500, 12_600).sum() - 1) < 2e-11
    assert abs(best_of_n_weights(6_144, 12_600).sum() - 1) < 2e-10


@pytest.mark.parametrize(
    ("n", "published"),
    [(1, 0), (2, 0.193), (4, 0.636), (16, 1.835), (1000, 5.909), (12_500, 8.434), (12_600, 8.442), (60_000, 10.002)],
)
def test_kl_bound_at_the_published_values(n, published):
    assert kl_bound(n) == pytest.approx(published, abs=5e-4)


def test_kl_of_discrete_responses_is_exact_and_below_the_bound():
    # four equally likely outcomes, n = 4: masses (i^4 - (i-1)^4) / 256 = 1, 15, 65, 175 over 256, each against 1/4
    masses = np.array([1, 15, 65, 175]) / 256
    by_hand = float(masses @ np.log(4 * masses))
    assert by_hand == pytest.approx(0.590, abs=5e-4)
    for repeats in (1, 25):  # only the shares of the samples matter
        scores = np.repeat([[3.0, 0.0, 1.0, 2.0]], repeats, axis=1)
        assert empirical_kl(scores, [4]).item() == pytest.approx(by_hand, rel=1e-12)
    # two equally likely answers: log 2 - h(2^-n), which never passes log 2 while the bound grows
    for n in (1, 2, 5, 20, 4000):
        p = 2.0**-n
        entropy = -p * math.log(p) - (1 - p) * math.log1p(-p) if 0 < p < 1 else 0.0
        expected = math.log(2) - entropy
        assert empirical_kl([[0.0, 1.0] * 6], [n]).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert expected <= math.log(2)


def test_kl_against_enumerated_draws():
    scores = np.array([0.0, 0.0, 1.0, 2.0, 2.0, 2.0])
    for n in (1, 2, 3):
        picked = np.zeros(6)
        for draw in itertools.product(range(6), repeat=n):
            best = [i for i in draw if scores[i] == max(scores[list(draw)])]
            for i in best:
                picked[i] += 1 / len(best) / 6**n
        expected = float(picked @ np.log(6 * picked))
        assert empirical_kl(scores[None], [n]).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_kl_without_ties_is_nearly_the_bound_and_never_above():
    scores = RNG.normal(size=(2, 4096))
    ns = [1, 2, 64, 1024, 4096]
    bounds = np.array([kl_bound(n) for n in ns])
    found = empirical_kl(scores, ns)
    assert (found <= bounds[:, None] + 1e-12).all()
    np.testing.assert_allclose(found[:3, 0], bounds[:3], atol=2e-4)
    # at n = N the place j from the top is picked with chance e^-j (1 - 1/e), whose entropy is 1.0407 nats
    assert found[-1, 0] == pytest.approx(math.log(4096) - 1.0407, abs=5e-4)
    assert empirical_kl(EQUAL, [7]).tolist() == [[0.0, 0.0]]


def test_win_shares_reach_the_bound_by_gold_and_one_half_by_chance():
    gold = RNG.normal(size=(2, 9))
    ns = [1, 2, 5, 9]
    by_gold = best_of_n(gold, win_shares(gold), ns).gold
    np.testing.assert_allclose(by_gold, [[n / (n + 1)] * 2 for n in ns], rtol=1e-12)
    by_noise = best_of_n(RNG.normal(size=(2, 9)), win_shares(gold), ns).gold
    assert (by_noise <= by_gold + 1e-12).all()
    np.testing.assert_allclose(by_noise[0], 0.5, rtol=1e-12)
    np.testing.assert_allclose(win_shares(EQUAL), 0.5, rtol=1e-12)
    # by hand: 0 beats nothing and ties once: (0 + 1/2 * 2 + 1/2) / 4; 5 beats two: (2 + 1/2 + 1/2) / 4
    assert win_shares([[0.0, 5.0, 0.0]]).tolist() == [[0.375, 0.75, 0.375]]


def test_intervals_cover_and_shrink_with_prompts():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = prompt_intervals(rng.normal(size=(1, 40)), rng=rng, resamples=200)[0]
        covered += low < 0 < high
    assert 0.88 <= covered / 200 <= 0.98  # percentiles of 40 prompts cover a little less than they say
    wide, narrow = (np.diff(prompt_intervals(rng.normal(size=(1, p)), rng=rng))[0, 0] for p in (30, 3000))
    assert narrow < wide / 5
    assert np.isnan(prompt_intervals([[1.0], [2.0]], rng=rng)).all()


@pytest.mark.slow
def test_the_papers_size_is_quick():
    rng = np.random.default_rng(2)
    proxy = rng.normal(size=(1000, 12_600))
    gold = proxy + rng.normal(size=proxy.shape)
    ns = [*(2**k for k in range(13)), 6144, 8192, 12_500]
    started = time.process_time()
    curve = best_of_n(proxy, gold, ns)
    assert time.process_time() - started < 60
    assert curve.gold.shape == (16, 1000)
    assert (np.diff(curve.proxy.mean(1)) > 0).all()
    np.testing.assert_allclose(curve.gold.mean(1), curve.proxy.mean(1), atol=0.1)  # gold is the proxy and noise


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n([[1.0, 2.0]], [[1.0, 2.0]], [3]), r"n must be in 1 \.\. 2, the number of samples, got 3"),
        (lambda: best_of_n([[1.0, 2.0]], [[1.0, 2.0]], [0]), r"n must be in 1 \.\. 2.*got 0"),
        (lambda: best_of_n([[1.0, math.nan]], [[1.0, 2.0]], [1]), "finite, got nan for prompt 0, sample 1"),
        (lambda: best_of_n([[1.0, 2.0]], [[math.inf, 2.0]], [1]), "finite, got inf for prompt 0, sample 0"),
        (lambda: best_of_n([[1.0, 2.0]], [[1.0]], [1]), r"like the scores, \(1, 2\), got \(1, 1\)"),
        (lambda: best_of_n([1.0, 2.0], [1.0, 2.0], [1]), r"\[prompts, samples\].*got shape \(2,\)"),
        (lambda: kl_bound(0), "n must be >= 1, got 0"),
        (lambda: empirical_kl([[1.0]], [0]), "n must be >= 1, got 0"),
        (lambda: prompt_intervals([[1.0, 2.0]], rng=RNG, resamples=10), "resamples must be >= 100, got 10"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
