"""Statistics of a probe, each against numbers worked out by hand."""

import math

import numpy as np
import pytest

from lit_rlhf.functional.probe_stats import clustered_mean, finite, standardised, summarise, win_rates


def row(prompt=0, **changes):
    plain = {
        "prompt_index": prompt, "kl_k1": 1.0, "kl_k2": 0.5, "kl_k3": 0.7, "proxy": 2.0, "proxy_members": [1.0, 3.0],
        "proxy_by": None, "implicit_reward": None, "gold": 1.0, "gold_by": {"warm": 2.0}, "length": 3, "ended": True,
    }  # fmt: skip
    return plain | changes


def test_one_value_a_cluster_gives_the_familiar_standard_error():
    """1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, variance 7, error sqrt(7 / 3)."""
    assert clustered_mean([1, 2, 6], [5, 9, 7]) == (3, pytest.approx(math.sqrt(7 / 3), rel=1e-12))


def test_samples_of_a_prompt_do_not_count_as_independent():
    """Repeating each value changes nothing: sums double, N doubles."""
    once = clustered_mean([1, 2, 6], [0, 1, 2])
    assert clustered_mean([1, 1, 2, 2, 6, 6], [0, 0, 1, 1, 2, 2]) == pytest.approx(once, rel=1e-12)


def test_opposite_samples_of_a_prompt_cancel():
    """Deviations -1, +1 in each of two prompts sum to 0 in both."""
    assert clustered_mean([1, 3, 1, 3], [0, 0, 1, 1]) == (2, 0)


def test_unequal_clusters():
    """0, 0 | 3: mean 1, sums -2 and 2; 2/1 x (4 + 4) / 9 = 16/9."""
    assert clustered_mean([0, 0, 3], [0, 0, 1]) == (1, pytest.approx(4 / 3, rel=1e-12))


def test_a_single_cluster_has_no_error():
    assert clustered_mean([1, 2], [0, 0]) == (1.5, None)


def test_wins_count_over_the_base_of_the_same_prompt_and_ties_half():
    """Prompt 0 has base 1 and 2: 2 beats one and ties one. Prompt 1 has base 9: 5 loses, 9 ties."""
    np.testing.assert_allclose(win_rates([2, 5, 9], [0, 1, 1], [1, 2, 9], [0, 0, 1]), [0.75, 0, 0.5], rtol=1e-12)


def test_standardised_by_the_spread_of_the_base():
    """Base 1, 3: mean 2, deviation sqrt(2); values mean 4."""
    assert standardised([3, 5], [1, 3]) == pytest.approx(math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("base", [[2.0], [2.0, 2.0], [0.1 + 0.2, 0.3]])
def test_without_spread_there_is_no_scale(base):
    assert standardised([3, 5], base) is None


def test_a_summary_by_hand():
    base = [row(0, gold=1.0, proxy=1.0), row(1, gold=3.0, proxy=3.0)]
    rows = [row(0, gold=2.0, kl_k1=1.0), row(1, gold=3.0, kl_k1=3.0, proxy_members=[1.0, 5.0], ended=False, length=5)]
    found = summarise(rows, base)
    assert (found["kl_k1"], found["kl_k1_se"]) == (2, 1)
    assert (found["gold"], found["gold_se"], found["gold_by"]) == (2.5, 0.5, {"warm": 2.0})
    assert found["gold_z"] == pytest.approx(0.5 / math.sqrt(2), rel=1e-12)
    assert found["proxy_z"] == 0
    assert found["proxy_members"] == [1, 4]
    assert found["proxy_std"] == 1.5  # population deviations 1 and 2
    assert found["proxy_by"] is None
    parts = [row(i, proxy_by={"a": float(i), "b": 3.0}) for i in range(2)]
    assert summarise(parts, base)["proxy_by"] == {"a": 0.5, "b": 3.0}
    assert (found["win_rate"], found["win_rate_se"]) == (0.75, 0.25)
    assert (found["length"], found["eos_rate"]) == (4, 0.5)
    assert found["implicit_reward"] is None


def test_what_is_not_there_is_none():
    rows = [row(i, gold=None, gold_by=None, proxy=None, proxy_members=None) for i in range(2)]
    found = summarise(rows, None)
    assert {found[n] for n in ("gold", "gold_se", "gold_z", "gold_by", "proxy", "proxy_std", "win_rate")} == {None}
    assert found["kl_k1"] == 1


def test_numbers_that_json_lacks_become_none():
    assert finite({"a": [math.inf, np.float64(1.5)], "b": (math.nan, "x", 2)}) == {
        "a": [None, 1.5],
        "b": [None, "x", 2],
    }
    assert summarise([row(0, kl_k3=math.inf), row(1)], None)["kl_k3"] is None
