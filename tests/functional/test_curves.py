"""Curves and outcomes of methods, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from lit_rlhf.functional.curves import curve_of, interval, law_of, outcome, place, scale


def line(step, kl, z, **changes):
    """A record whose gold is 10 + 2 z, so that one standard deviation is 2."""
    return {
        "step": step,
        "kl_k1": kl,
        "gold_z": z,
        "gold": 10 + 2 * z,
        "gold_se": 0.5,
        "win_rate": 0.5 + z / 10,
    } | changes


def rows(step, golds):
    return [{"step": step, "prompt_index": i, "sample_index": 0, "gold": g} for i, g in enumerate(golds)]


def test_interval_over_seeds():
    """1, 3: mean 2, deviation sqrt(2), error 1; Student's 97.5 % point for one degree of freedom is 12.706."""
    assert interval([1, 3]) == (2, pytest.approx(12.7062, rel=1e-6))
    assert interval([1, 2, 3]) == (2, pytest.approx(4.3027 / math.sqrt(3), rel=1e-6))
    assert interval([5]) == (5, None)


def test_the_scale_comes_back_from_scores_and_their_standardised_values():
    assert scale([line(0, 0, 0), line(1, 1, -3), line(2, 4, 1)], "gold") == 2
    assert scale([line(0, 0, 0)], "gold") is None
    assert scale([line(0, 0, 0), line(1, 1, 0)], "gold") is None


def test_a_single_seed_has_the_band_of_its_prompts():
    curve = curve_of("a", [[line(0, 0, 0), line(1, 1, 1), line(2, 4, 0.5)]])
    np.testing.assert_allclose(curve.sqrt_kl, [0, 1, 2], rtol=1e-12)
    np.testing.assert_allclose(curve.gold.high - curve.gold.middle, [1.96 * 0.5 / 2] * 3, rtol=1e-12)
    assert curve.proxy is None
    assert curve.fit is None  # two points away from KL 0 fix a law but do not test it


def test_seeds_are_averaged_at_the_steps_that_all_have():
    runs = [[line(0, 0, 0), line(1, 1, 1), line(2, 4, 1)], [line(0, 0, 0), line(2, 9, 3)]]
    curve = curve_of("a", runs)
    assert curve.steps == (0, 2)
    np.testing.assert_allclose(curve.sqrt_kl, [0, 2.5], rtol=1e-12)
    np.testing.assert_allclose(curve.gold.middle, [0, 2], rtol=1e-12)
    np.testing.assert_allclose(curve.gold.low, [0, 2 - 12.7062], rtol=1e-6)


def test_the_law_is_found_again():
    """R = d (1 - 0.5 log d) peaks where log d = 1 / 0.5 - 1."""
    run = [line(i, d**2, d * (1 - 0.5 * math.log(d)) if d else 0) for i, d in enumerate([0, 1, 2, 3, 4])]
    law = curve_of("a", [run]).fit
    assert (law.alpha, law.beta) == (pytest.approx(1, rel=1e-9), pytest.approx(0.5, rel=1e-9))
    assert law.peak_kl == pytest.approx(math.e**2, rel=1e-9)


def test_the_law_weighs_points_by_their_errors():
    """A point with a huge error has no say, and one whose error is 0 by chance has no more than the surest other."""
    run = [line(i, d**2, d * (1 - 0.5 * math.log(d)) if d else 0) for i, d in enumerate([0, 1, 2, 3, 4])]
    wild = [*run, line(5, 25, 40, gold_se=1e6)]
    assert curve_of("a", [wild]).fit.beta == pytest.approx(0.5, rel=1e-6)
    even = curve_of("a", [[*run, line(5, 25, 40)]]).fit
    assert even.beta < 0
    assert curve_of("a", [[*run, line(5, 25, 40, gold_se=0.0)]]).fit == even
    assert curve_of("a", [[*run, line(5, 25, 40, gold_se=None)]]).fit.beta == pytest.approx(even.beta, rel=1e-9)


def noisy(seed, *, points=7, prompts=64, samples=True):
    """Records and samples of gold 10 + 2 d (1 - 0.5 log d) with noise 1 between prompts and 0.5 on each answer."""
    rng = np.random.default_rng(seed)
    level, run, said = np.random.default_rng(9).normal(size=prompts), [], []
    for step in range(points):
        d = 0.8 * step
        gold = 10 + 2 * (d * (1 - 0.5 * math.log(d)) if d else 0) + level + 0.5 * rng.normal(size=prompts)
        kl = d**2 + (0.3 * rng.normal(size=prompts) if d else np.zeros(prompts))
        base = gold if step == 0 else base  # noqa: F821
        z = float((gold.mean() - base.mean()) / base.std(ddof=1))
        se = float(gold.std(ddof=1)) / math.sqrt(prompts)
        run.append({"step": step, "kl_k1": float(kl.mean()), "gold": float(gold.mean()), "gold_se": se, "gold_z": z})
        said += [row | {"kl_k1": k} for row, k in zip(rows(step, gold.tolist()), kl.tolist(), strict=True)]
    return run, said if samples else []


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_law_has_intervals_over_prompts_and_seeds(seeds):
    runs, samples = zip(*(noisy(seed) for seed in range(seeds)), strict=True)
    law = law_of(runs, samples)
    fit, drawn = law.fit, curve_of("a", runs).fit
    assert (fit.alpha, fit.beta) == (pytest.approx(drawn.alpha, rel=1e-9), pytest.approx(drawn.beta, rel=1e-9))
    for value, (low, high) in (
        (fit.alpha, fit.alpha_interval), (fit.beta, fit.beta_interval),
        (fit.peak_kl, fit.peak_kl_interval), (fit.peak_gold, fit.peak_gold_interval),
    ):  # fmt: skip
        assert low < value < high < low + 0.5 * abs(value) + 0.1 * value
    assert fit.no_peak_share == 0
    assert law.errors["rl"] < 0.1 < law.errors["quadratic"]
    assert law_of(runs, samples) == law  # the resamples are the same


def test_without_samples_seeds_alone_are_resampled():
    runs = [noisy(seed, samples=False)[0] for seed in range(3)]
    assert law_of(runs, [[], [], []]).fit.beta_interval is not None
    assert law_of(runs[:1], [[]]).fit.beta_interval is None
    assert law_of([runs[0][:3]], [[]]) is None


def test_prompts_that_differ_between_seeds_are_not_resampled_together():
    runs, samples = zip(*(noisy(seed) for seed in range(2)), strict=True)
    others = [row | {"prompt": "another"} for row in samples[1]]
    assert law_of(runs, [samples[0], others]) == law_of(runs, [[], []]) != law_of(runs, samples)


def test_a_probe_left_out_leaves_for_all_seeds():
    """Left out alone, a step would be foretold by its twin in the other seed: the error of a wrong form would be 0."""
    run = [line(i, d**2, h) for i, (d, h) in enumerate([(0, 0), (1, 1), (2, 2), (3, 5)])]
    assert law_of([run, run], [[], []]).errors["bon"] == pytest.approx(math.sqrt((8 / 9 + 4) / 3), rel=0.1)  # weights


def test_negative_kl_estimates_stand_at_0_and_gaps_stay_gaps():
    curve = curve_of("a", [[line(0, -0.5, 0), line(1, 1, 0, gold_z=None, gold=None), line(2, 4, 1)]])
    assert curve.sqrt_kl[0] == 0
    assert np.isnan(curve.gold.middle[1])


def test_best_of_n_stands_at_its_bound_and_takes_its_own_form():
    run = [{"n": n, "kl_bound": float(n), "gold_z": n - 0.1 * n**2, "gold": 1.0} for n in (1, 4, 9)]
    curve = curve_of("bon", [run])
    assert [place(record) for record in run] == [1, 4, 9]
    np.testing.assert_allclose(curve.sqrt_kl, [1, 2, 3], rtol=1e-12)
    assert curve.fit.form == "bon"


def test_outcome_by_hand():
    """Every prompt gains 4 (2 sd) and loses 3; all halves agree on the peak."""
    run = [line(0, 0, 0), line(1, 1, 2), line(2, 9, 0.5)]
    samples = [
        row for step, height in ((0, 0), (1, 4), (2, 1)) for row in rows(step, [10.0 + i + height for i in range(4)])
    ]
    found = outcome("a", [run], [samples])
    assert (found.peak_gold.value, found.final_gold.value, found.drop.value) == (2, 0.5, 0.75)
    assert (found.peak_kl.value, found.final_kl.value, found.win_rate.value) == (1, 9, 0.55)
    assert found.drop.half is None
    assert outcome("a", [run], [[]]) == found  # the highest record, where samples are missing


def test_the_peak_of_pure_noise_is_not_flattering():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(40, 30, 200))  # runs, records, prompts
    gold[:, 0] -= gold[:, 0].mean(1, keepdims=True)
    peaks = []
    for run in gold:
        records = [line(i, i / 10, z) for i, z in enumerate(run.mean(1) - run[0].mean())]
        peaks.append(outcome("a", [records], [[r for i, g in enumerate(2 * run) for r in rows(i, g)]]).peak_gold.value)
    highest = (gold.mean(2).max(1) - gold[:, 0].mean(1)).mean()
    assert highest > 0.1
    assert abs(np.mean(peaks)) < 3 * np.std(peaks) / math.sqrt(40)


def test_drops_of_seeds_are_pooled():
    """Gains 2 and 4, falls 1 and 3: 4 / 6. Residuals 1 - 4/3 and 3 - 8/3: -+1/3, error 1/3, over a mean gain of 3."""
    runs = [[line(0, 0, 0), line(1, 1, 2), line(2, 4, 1)], [line(0, 0, 0), line(1, 1, 4), line(2, 4, 1)]]
    drop = outcome("a", runs, [[], []]).drop
    assert drop.value == pytest.approx(2 / 3, rel=1e-12)
    assert drop.half == pytest.approx(12.7062 / 9, rel=1e-6)


def test_a_drop_of_a_gain_within_its_noise_is_none():
    """Error 0.5 / 2 at each end, so 0.35 of the difference and 0.25 of two runs' mean; twice that is 0.71 and 0.5."""

    def drop(*gains, se=0.5):
        runs = [[line(0, 0, 0, gold_se=se), line(1, 1, g, gold_se=se), line(2, 4, g - 3, gold_se=se)] for g in gains]
        return outcome("a", runs, [[]] * len(runs)).drop

    assert drop(0.7) is None
    assert drop(0.72).value == pytest.approx(3 / 0.72, rel=1e-9)
    assert drop(0.52, 0.52).value == pytest.approx(3 / 0.52, rel=1e-9)
    assert drop(0.48, 0.48) is None
    assert drop(0.1, 1.2, se=0.01) is None  # seeds disagree: 0.65 with an error of 0.55


def test_nothing_gained_or_no_gold_has_no_drop():
    falling = [line(0, 0, 0), line(1, 1, -1)]
    assert outcome("a", [falling], [[]]).drop is None
    bare = [line(step, 2 * step, 0, gold=None, gold_z=None, win_rate=None) for step in range(2)]
    found = outcome("a", [bare], [[]])
    assert (found.peak_gold, found.drop, found.win_rate) == (None, None, None)
    assert found.final_kl.value == 2
