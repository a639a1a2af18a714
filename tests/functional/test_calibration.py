"""Intervals, reliability, ECE and Brier: by hand, against NumPy loops, SciPy and torchmetrics, and by invariances."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torchmetrics.functional.classification import binary_calibration_error

from lit_rlhf.functional.calibration import (
    agreement,
    brier,
    expected_calibration_error,
    macro_average,
    proportion,
    reliability,
    sigmoid,
)
from tests import reference as ref

LOG3 = math.log(3)


def draw(seed=0, n=400, soft=False):
    rng = np.random.default_rng(seed)
    margin = 1.5 * rng.normal(size=n) + 0.6
    label = rng.uniform(size=n).round(1) if soft else np.ones(n)
    return margin, label, rng.integers(0, n // 4, size=n)


def test_sigmoid_is_right_and_never_overflows():
    x = [-1000.0, -3.0, 0.0, 0.5, 1000.0]
    np.testing.assert_allclose(sigmoid(x), [ref.sigmoid(v) for v in x], rtol=1e-15)


def test_ties_count_half_and_soft_labels_their_probability():
    np.testing.assert_array_equal(agreement([2, -1, 0, 3, -3], [1, 1, 1, 0.7, 0.7]), [1, 0, 0.5, 0.7, 1 - 0.7])


def test_wilson_by_hand():
    """A share of 8/10, z^2 = 3.8415: centre (0.8 + 0.19207) / 1.38415, half 1.96 sqrt(0.016 + 0.009604) / 1.38415."""
    found = proportion([1] * 8 + [0] * 2, range(10))
    assert (found.value, found.n, found.clusters) == (0.8, 10, 10)
    assert found.low == pytest.approx(0.716738 - 0.226577, abs=1e-5)
    assert found.high == pytest.approx(0.716738 + 0.226577, abs=1e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 7), (7, 7), (41, 100)])
def test_with_one_pair_a_prompt_it_is_scipys_wilson(right, n):
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    ours = proportion([1] * right + [0] * (n - right), range(n))
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))


def test_pairs_that_repeat_their_prompt_add_nothing():
    """Ten prompts of four equal pairs know what ten pairs know, but for the small-sample factors 10/9 and 40/39."""
    few = proportion([1] * 7 + [0] * 3, range(10))
    many = proportion([1] * 28 + [0] * 12, np.repeat(range(10), 4))
    assert many.value == few.value
    assert (many.n, many.clusters) == (40, 10)
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.05)  # those factors
    assert many.high - many.low > few.high - few.low
    naive = proportion([1] * 28 + [0] * 12, range(40))
    assert many.high - many.low > 1.7 * (naive.high - naive.low)


def test_prompts_whose_pairs_cancel_do_not_narrow_the_interval():
    """One right and one wrong pair in each prompt: the robust variance is 0, and the pairs still count as two each."""
    assert proportion([1, 0] * 8, np.repeat(range(8), 2)).low == proportion([1, 0] * 8, range(16)).low


def test_perfect_accuracy_is_as_sure_as_there_are_prompts():
    """At a share of 1 the lower end is 1 / (1 + z^2 / m)."""
    found = proportion(np.ones(40), np.repeat(range(10), 4))
    assert (found.low, found.high) == (pytest.approx(1 / (1 + 1.959964**2 / 10), rel=1e-6), 1)
    assert proportion([1, 1, 1], [4, 4, 4]).low == pytest.approx(1 / (1 + 1.959964**2), rel=1e-6)


def test_swapping_the_responses_mirrors_accuracy_and_interval():
    margin, label, prompts = draw()
    a, b = (proportion(agreement(m, label), prompts) for m in (margin, -margin))
    assert b.value == pytest.approx(1 - a.value, abs=1e-12)
    assert (b.low, b.high) == (pytest.approx(1 - a.high, abs=1e-12), pytest.approx(1 - a.low, abs=1e-12))


def test_intervals_cover():
    """Of 95 % intervals over 30 prompts of 1 to 6 pairs that share most of their luck, about 95 % hold the truth."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        prompts = np.repeat(range(30), rng.integers(1, 7, size=30))
        shared = rng.uniform(size=30)[prompts]
        own = rng.uniform(size=len(prompts))
        right = np.where(rng.uniform(size=len(prompts)) < 0.8, shared, own) < 0.7
        found = proportion(right, prompts)
        hits += found.low <= 0.7 <= found.high
    assert 0.92 < hits / 400 < 0.99


def test_the_average_of_groups_by_hand():
    """(0.8 + 0.6) / 2, its ends by the root of summed squares: sqrt(0.3^2 + 0.4^2) / 2 = 0.25 below."""
    a, b = proportion([1], [0]), proportion([0, 1], [1, 2])
    a = a.__class__(0.8, 0.5, 0.9, 10, 10)
    b = b.__class__(0.6, 0.2, 0.6 + math.sqrt(0.03), 30, 20)
    found = macro_average([a, b])
    assert (found.value, found.low) == (pytest.approx(0.7, rel=1e-12), pytest.approx(0.45, rel=1e-12))
    assert found.high == pytest.approx(0.7 + math.sqrt(0.01 + 0.03) / 2, rel=1e-12)
    assert (found.n, found.clusters) == (40, 30)
    alone = macro_average([a])
    assert (alone.value, alone.low, alone.high) == (0.8, pytest.approx(0.5, abs=1e-12), pytest.approx(0.9, abs=1e-12))


def test_reliability_and_ece_by_hand():
    """Margins +-log 3 say 3/4, the tie 1/2. Of the four sure pairs three are right, the tie is right by half: ECE 0."""
    bins = reliability([LOG3, LOG3, LOG3, -LOG3, 0.0], np.ones(5), range(5), bins=2)
    assert [b.confidence for b in bins] == [0.5, pytest.approx(0.75, abs=1e-12)]
    assert [b.accuracy.value for b in bins] == [0.5, 0.75]
    assert [b.accuracy.n for b in bins] == [1, 4]
    assert expected_calibration_error(bins) == pytest.approx(0, abs=1e-12)
    worse = reliability([LOG3, LOG3, -LOG3, -LOG3, 0.0], np.ones(5), range(5), bins=2)
    assert expected_calibration_error(worse) == pytest.approx(4 / 5 * 0.25, abs=1e-12)


def test_ece_is_torchmetrics_over_both_orders():
    margin, label, prompts = draw()
    p = torch.as_tensor(sigmoid(margin))
    both, truth = torch.cat([p, 1 - p]), torch.cat([torch.ones(len(p)), torch.zeros(len(p))]).long()
    ours = expected_calibration_error(reliability(margin, label, prompts, bins=10))
    assert ours == pytest.approx(binary_calibration_error(both, truth, n_bins=20).item(), abs=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_ece_equals_a_slow_version(soft):
    margin, label, prompts = draw(1, soft=soft)
    ours = expected_calibration_error(reliability(margin, label, prompts, bins=7))
    assert ours == pytest.approx(ref.expected_calibration_error(margin, label, bins=7), abs=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_the_order_of_a_pair_means_nothing(soft):
    """Exchanging the responses turns margin and label around together; nothing measured may change."""
    margin, label, prompts = draw(2, soft=soft)
    a, b = reliability(margin, label, prompts), reliability(-margin, 1 - label, prompts)
    assert [x.accuracy.value for x in a] == pytest.approx([x.accuracy.value for x in b], abs=1e-12)
    np.testing.assert_allclose(brier(margin, label), brier(-margin, 1 - label), atol=1e-15)


def test_brier_by_hand():
    """Said 3/4 of the truth: (1/4)^2; said 1/4: (3/4)^2; said 1/2: 1/4; a soft label that is met costs nothing."""
    np.testing.assert_allclose(brier([LOG3, -LOG3, 0, LOG3], [1, 1, 1, 0.75]), [1 / 16, 9 / 16, 1 / 4, 0], atol=1e-15)


def test_a_calibrated_model_has_little_ece_and_an_overconfident_one_much():
    rng = np.random.default_rng(5)
    margin = rng.normal(size=20000)
    label = (rng.uniform(size=20000) < sigmoid(margin)).astype(float)
    prompts = np.arange(20000)
    good = expected_calibration_error(reliability(margin, label, prompts))
    sure = expected_calibration_error(reliability(4 * margin, label, prompts))
    assert good < 0.02
    assert sure > 0.15
    assert brier(margin, label).mean() < brier(4 * margin, label).mean()
