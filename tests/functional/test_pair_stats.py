"""Statistics of scored pairs: by hand, against SciPy, and by invariances."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lit_rlhf.errors import UserError
from lit_rlhf.functional.pair_stats import Pairs, against_length, shift, summarise, usage


def pairs(chosen, rejected, chosen_length=None, rejected_length=None, categories=None, prompts=None, **more):
    n = len(chosen)
    columns = {
        "chosen": chosen, "rejected": rejected, "label": np.ones(n),
        "chosen_length": [5] * n if chosen_length is None else chosen_length,
        "rejected_length": [5] * n if rejected_length is None else rejected_length,
    }  # fmt: skip
    return Pairs(
        **{name: np.array(values, np.float64) for name, values in columns.items()},
        prompts=np.arange(n) if prompts is None else np.array(prompts),
        categories=[None] * n if categories is None else categories,
        **more,
    )


def random_pairs(seed=0, n=60):
    rng = np.random.default_rng(seed)
    return pairs(
        rng.normal(size=n), rng.normal(size=n), rng.integers(3, 9, size=n), rng.integers(3, 9, size=n),
        list(np.array(["a", "b", None], dtype=object)[rng.integers(0, 3, size=n)]), rng.integers(0, n // 3, size=n),
    )  # fmt: skip


def test_a_summary_by_hand():
    """Right, wrong, tied, right: 2.5 / 4. Longer is better: right, tie, wrong, right. a 1 / 2, b 1.5 / 2."""
    found = summarise(
        pairs([2, 0, 1, 3], [1, 1, 1, 0], [7, 5, 4, 9], [6, 5, 6, 8], ["a", "a", "b", "b"], prompts=[1, 1, 2, 3])
    )
    assert found["accuracy"]["value"] == 2.5 / 4
    assert (found["accuracy"]["n"], found["accuracy"]["clusters"]) == (4, 3)
    assert found["length_accuracy"]["value"] == 2.5 / 4
    assert found["ties"] == 1
    assert found["margin"] == (1 - 1 + 0 + 3) / 4
    assert {name: entry["accuracy"]["value"] for name, entry in found["categories"].items()} == {"a": 0.5, "b": 0.75}
    assert found["categories"]["b"]["length_accuracy"]["value"] == 0.5
    assert found["macro"]["value"] == 0.625
    assert found["experts"] == {}
    json.dumps(found, allow_nan=False)


def test_swapping_maps_accuracy_a_to_1_minus_a():
    there = random_pairs()
    back = replace(
        there, chosen=there.rejected, rejected=there.chosen, chosen_length=there.rejected_length,
        rejected_length=there.chosen_length,
    )  # fmt: skip
    a, b = summarise(there), summarise(back)
    for name in ("accuracy", "length_accuracy", "macro"):
        assert b[name]["value"] == pytest.approx(1 - a[name]["value"], abs=1e-12)
    assert b["length"]["spearman"] == pytest.approx(a["length"]["spearman"], abs=1e-12)
    relabelled = summarise(replace(back, label=1 - back.label))
    for name in ("ece", "brier"):
        assert relabelled[name] == pytest.approx(a[name], abs=1e-12)


def test_soft_labels_are_graded_by_their_majority_and_even_ones_not():
    """Chosen, rejected, chosen, tied by label: of three graded pairs the first and the third are right."""
    there = replace(
        pairs([2, 2, 0, 2], [1, 1, 1, 1], categories=["a", "b", "b", "c"]), label=np.array([0.6, 0.3, 0.2, 0.5])
    )
    found = summarise(there)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (pytest.approx(2 / 3), 3)
    assert {name: entry["accuracy"]["value"] for name, entry in found["categories"].items()} == {"a": 1, "b": 0.5}
    assert found["length_accuracy"]["n"] == 3
    p = 1 / (1 + np.exp(-1))
    squared = [(p - 0.6) ** 2, (p - 0.3) ** 2, (1 - p - 0.2) ** 2, (p - 0.5) ** 2]
    assert found["brier"] == pytest.approx(np.mean(squared), abs=1e-12)
    with pytest.raises(UserError, match=r"all 4 pairs have label 0\.5"):
        summarise(replace(there, label=np.full(4, 0.5)))


def test_calibration_is_of_the_logits_and_accuracy_of_the_scores():
    """Scores on another scale change neither ECE nor Brier, and logits no accuracy; margins stand in for logits."""
    there = random_pairs(4)
    scaled = replace(there, chosen=5 * there.chosen, rejected=5 * there.rejected, logits=there.margin)
    a, b, wrong = summarise(there), summarise(scaled), summarise(replace(scaled, logits=None))
    for name in ("ece", "brier", "reliability", "accuracy"):
        assert a[name] == b[name]
    assert wrong["ece"] != a["ece"]
    assert wrong["brier"] != a["brier"]
    assert summarise(replace(there, logits=-there.margin))["accuracy"] == a["accuracy"]
    assert b["categories"]["a"]["brier"] == a["categories"]["a"]["brier"]


def test_the_order_of_the_rows_means_nothing():
    there = random_pairs(1)
    order = np.random.default_rng(2).permutation(60)
    names = ("chosen", "rejected", "label", "chosen_length", "rejected_length", "prompts")
    moved = replace(
        there, **{name: getattr(there, name)[order] for name in names}, categories=[there.categories[i] for i in order]
    )
    a, b = summarise(there), summarise(moved)
    assert b["accuracy"] == pytest.approx(a["accuracy"], abs=1e-12)
    assert b["ece"] == pytest.approx(a["ece"], abs=1e-12)
    assert list(b["categories"]) == list(a["categories"]) == ["(no category)", "a", "b"]


def test_a_group_of_one_has_no_macro_average_and_no_category_none():
    assert summarise(pairs([1, 2], [0, 0], categories=["a", "a"]))["macro"] is None
    assert summarise(pairs([1, 2], [0, 0]))["categories"] == {}


def test_correlations_are_scipys_with_ties():
    found, there = against_length(random_pairs(3)), random_pairs(3)
    assert found["pearson"] == pytest.approx(stats.pearsonr(there.lengths, there.scores).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(stats.spearmanr(there.lengths, there.scores).statistic, abs=1e-6)
    assert found["slope"] == pytest.approx(stats.linregress(there.lengths, there.scores).slope, abs=1e-9)


def test_score_against_length_by_hand():
    """Scores are 2 lengths - 1 exactly; of three pairs of unequal length all prefer the longer response."""
    lengths = np.array([3.0, 4.0, 8.0, 5.0]), np.array([2.0, 6.0, 1.0, 5.0])
    found = against_length(pairs(2 * lengths[0] - 1, 2 * lengths[1] - 1, *lengths), bins=2)
    assert (found["pearson"], found["spearman"]) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-6))
    assert found["slope"] == pytest.approx(2, abs=1e-9)
    assert (found["prefers_longer"]["value"], found["prefers_longer"]["n"]) == (1, 3)
    # 1 2 3 4 | 5 5 6 8: mean lengths 2.5 and 6
    assert [point["length"] for point in found["curve"]] == [2.5, 6]
    assert [point["score"] for point in found["curve"]] == [4, 11]


def test_what_is_undefined_is_none():
    flat = against_length(pairs([1, 2], [0, 1]))
    assert (flat["pearson"], flat["spearman"], flat["slope"], flat["prefers_longer"]) == (None, None, None, None)
    assert against_length(pairs([1, 1], [1, 1], [3, 4], [5, 6]))["spearman"] is None
    assert shift([1.0, 1.0], [0, 1], [2.0], [0])["shift"] is None


def test_shift_by_hand():
    """Data 0 and 2: mean 1, sd sqrt 2. Samples 2, 3, 4: mean 3. They win 2.5, 3... of 6: (0: 3, 2: 2.5) / 6."""
    found = shift([0, 2], [1, 2], [2, 3, 4], [1, 2, 3])
    assert found["shift"] == pytest.approx(np.sqrt(2), rel=1e-12)
    assert found["auroc"] == pytest.approx(5.5 / 6, abs=1e-6)
    assert (found["samples"], found["prompts"]) == (3, 3)
    # errors 1 of the data, 1 / sqrt 3 of the samples
    half = 1.959964 * np.sqrt(1 + 1 / 3) / np.sqrt(2)
    assert found["high"] - found["shift"] == pytest.approx(half, rel=1e-6)
    assert found["shift"] - found["low"] == pytest.approx(half, rel=1e-6)


def test_auroc_is_mann_whitney_for_scores_of_any_size():
    rng = np.random.default_rng(4)
    data, policy = (1000 + 100 * rng.normal(size=n).round(1) for n in (70, 50))
    u = stats.mannwhitneyu(policy, data).statistic / (70 * 50)
    assert shift(data, range(70), policy, range(50))["auroc"] == pytest.approx(u, abs=1e-6)
    assert shift(policy, range(50), data, range(70))["auroc"] == pytest.approx(1 - u, abs=1e-6)


def test_shift_does_not_depend_on_the_scale_of_the_scores():
    rng = np.random.default_rng(6)
    data, policy = rng.normal(size=40), rng.normal(size=30) + 1
    a, b = shift(data, range(40), policy, range(30)), shift(3 * data - 7, range(40), 3 * policy - 7, range(30))
    assert b == pytest.approx(a, rel=1e-9)


def test_usage_counts_experts_by_category():
    gates = {"poems": np.array([1, 1, 0, 0.5]), "sums": np.array([0, 0, 1, 0.5])}
    found = summarise(pairs([1] * 4, [0] * 4, categories=["x", "x", "y", "y"], gates=gates))["experts"]
    assert found == {"x": {"poems": 2, "sums": 0}, "y": {"poems": 0.5, "sums": 1.5}}
    assert usage(gates, {}) == {"(no category)": {"poems": 2.5, "sums": 1.5}}
