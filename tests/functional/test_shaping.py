"""Rewards of tokens: by hand, against the formula, and what must not leak."""

import math

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.functional.shaping import kl_rewards, penalise_unended, satisficing, terminal_rewards
from tests import reference_ppo as ref

MASK = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)


def test_the_score_is_paid_on_the_last_token_that_counts():
    paid = terminal_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), MASK)
    assert paid.tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]


def test_kl_rewards_by_hand():
    """Half a unit a nat: log-ratios 1 and -2 cost -1/2 and pay 1; a third token does not count."""
    logps = torch.tensor([[-1.0, -3.0, math.nan]], requires_grad=True)
    rewards = kl_rewards(logps, torch.tensor([[-2.0, -1.0, 0.0]]), torch.tensor([[True, True, False]]), 0.5)
    assert rewards.tolist() == [[-0.5, 1.0, 0.0]]
    assert not rewards.requires_grad


def test_rewards_agree_with_the_formula():
    g = torch.Generator().manual_seed(0)
    logps, reference = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    scores = torch.randn(3, generator=g, dtype=torch.float64)
    rewards = terminal_rewards(scores, MASK[:3]) + kl_rewards(logps, reference, MASK[:3], 0.3)
    for i, length in enumerate((1, 2, 3)):
        rows = (float(scores[i]), logps[i, :length].tolist(), reference[i, :length].tolist())
        assert rewards[i, :length].tolist() == pytest.approx(ref.token_rewards(*rows, 0.3), rel=1e-12)
        assert not rewards[i, length:].any()


def test_coefficient_zero_and_a_policy_at_its_reference_cost_nothing():
    logps = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert not kl_rewards(logps, logps - 1, MASK, 0.0).any()
    assert not kl_rewards(logps, logps, MASK, 0.5).any()


def test_only_unended_responses_are_penalised():
    scores = penalise_unended(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), penalty=3.0)
    assert scores.tolist() == [1.0, -2.0]


def test_satisficing_by_hand_with_weights_outside_the_square():
    """-(2 (3 - 1)^2 + 0.5 (1 - 2)^2) = -8.5; at both thresholds 0. A third score has no threshold."""
    scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0]), "c": torch.tensor([9.0, 9.0])}
    thresholds, weights = {"b": 2.0, "a": 1.0}, {"a": 2.0, "b": 0.5}
    found = satisficing(scores, thresholds, weights)
    assert found.tolist() == [-8.5, 0.0]
    rows = [{name: float(score[i]) for name, score in scores.items()} for i in range(2)]
    assert found.tolist() == pytest.approx([ref.satisficing(row, thresholds, weights) for row in rows])


@pytest.mark.parametrize(
    ("thresholds", "weights", "message"),
    [
        ({}, {}, r"thresholds must be of the rewards \['a', 'b'\], got \[\]"),
        ({"x": 0.0}, {"x": 1.0}, r"thresholds must be of the rewards \['a', 'b'\], got \['x'\]"),
        ({"a": 0.0}, {"b": 1.0}, r"weights must be of \['a'\], got \['b'\]"),
    ],
)
def test_names_that_do_not_fit_are_refused(thresholds, weights, message):
    with pytest.raises(UserError, match=message):
        satisficing({"a": torch.zeros(1), "b": torch.zeros(1)}, thresholds, weights)


def test_a_score_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"score must have shape \(5,\), got \(4,\)"):
        terminal_rewards(torch.zeros(4), MASK)
