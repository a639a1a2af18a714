"""Aggregators: values by hand, against the formula, and what holds between them."""

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.functional.aggregation import Mean, UncertaintyWeighted, WeightedSum, WorstCase
from tests import reference as ref

# The scores of one response by K = 4 members: mean 3, deviations -2, -1, 0, 3, squares sum to 14, variance 14/4 or 14/3
SCORES = (1.0, 2.0, 3.0, 6.0)

# aggregator, its value on SCORES, where the value comes from
CASES = [
    (Mean(), 3.0, "12 / 4"),
    (WorstCase(), 1.0, "the smallest"),
    (UncertaintyWeighted(0.5), 1.25, "3 - 0.5 * 14/4"),
    (UncertaintyWeighted(0.5, ddof=1), 3 - 7 / 3, "3 - 0.5 * 14/3"),
    (UncertaintyWeighted(0.0), 3.0, "the mean"),
    (WeightedSum((1.0, 0.0, -1.0, 0.5)), 1.0, "1 - 3 + 3"),
]
AGGREGATORS = [case[0] for case in CASES]


def members(size=7, k=4):
    return torch.randn(size, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("aggregator", "expected", "why"), CASES, ids=[repr(a) for a in AGGREGATORS])
def test_value_by_hand(aggregator, expected, why):
    scores = torch.tensor([SCORES, SCORES], dtype=torch.float64)
    assert aggregator(scores).tolist() == pytest.approx([expected, expected], rel=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
def test_uncertainty_weighting_agrees_with_the_formula(ddof):
    scores = members()
    expected = [ref.uncertainty_weighted(row, 0.3, ddof) for row in scores.tolist()]
    assert UncertaintyWeighted(0.3, ddof)(scores).tolist() == pytest.approx(expected, rel=1e-12)


def test_coefficient_zero_is_bitwise_the_mean():
    assert torch.equal(UncertaintyWeighted(0.0)(members()), Mean()(members()))


def test_order_between_aggregators():
    scores = members()
    assert (WorstCase()(scores) <= Mean()(scores)).all()
    assert (UncertaintyWeighted(0.5)(scores) <= Mean()(scores)).all()
    torch.testing.assert_close(WeightedSum((0.25,) * 4)(scores), Mean()(scores))


def test_agreeing_members_are_not_punished():
    scores = torch.full((2, 3), 1.5)
    for aggregator in (Mean(), WorstCase(), UncertaintyWeighted(10.0)):
        assert aggregator(scores).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("aggregator", [Mean(), WorstCase(), UncertaintyWeighted(0.5)], ids=repr)
def test_members_have_no_order_and_no_origin(aggregator):
    scores = members()
    torch.testing.assert_close(aggregator(scores.flip(1)), aggregator(scores))
    torch.testing.assert_close(aggregator(scores + 5), aggregator(scores) + 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UncertaintyWeighted(-0.1), r"coefficient must be >= 0 and finite, got -0\.1"),
        (lambda: UncertaintyWeighted(0.1, ddof=2), "ddof must be 0 or 1, got 2"),
        (lambda: WeightedSum(()), r"weights must be one finite number a member, got \[\]"),
        (lambda: WeightedSum((1.0, float("inf"))), "weights must be one finite number a member"),
        (lambda: WeightedSum((1.0, 2.0))(members()), "2 weights for 4 reward models"),
        (lambda: UncertaintyWeighted(0.1, ddof=1)(members(k=1)), "ddof 1 needs more members than 1"),
        (lambda: Mean()(members(k=0)), "at least one reward model, got none"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_flat_score_is_refused():
    with pytest.raises(ValueError, match=r"shape \[B, K\], got \(3,\)"):
        Mean()(torch.zeros(3))
