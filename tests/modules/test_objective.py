"""The task's score: by hand, for every objective."""

import math

import pytest
import torch

from lit_rlhf.modules.objective import NegativeKL, Objective, Satisficing, WeightedReward
from lit_rlhf.specs import build, plain
from lit_rlhf.types import UserError

SCORES = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([3.0, 5.0])}

CASES = [
    (WeightedReward(), [4, 3]),
    (WeightedReward({"b": 2.0}), [6, 10]),
    (WeightedReward({"b": 1.0, "a": -1.0}), [2, 7]),
    (NegativeKL(), [0, 0]),
    (Satisficing({"a": 2.0}), [-1, -16]),
    (Satisficing({"a": 2.0, "b": 4.0}, {"b": 3.0, "a": 0.5}), [-0.5 - 3, -8 - 3]),
]


@pytest.mark.parametrize(("objective", "expected"), CASES)
def test_scores_by_hand(objective, expected):
    objective.check(["a", "b"])
    assert objective.combine(SCORES).tolist() == pytest.approx(expected)
    assert build(plain(objective), Objective) == objective


def test_every_objective_has_a_row():
    assert {type(objective) for objective, _ in CASES} == set(Objective.__subclasses__())


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedReward({}),
        lambda: WeightedReward({"a": math.nan}),
        lambda: Satisficing({}),
        lambda: Satisficing({"a": math.inf}),
        lambda: Satisficing({"a": 1.0}, {"b": 1.0}),
        lambda: Satisficing({"a": 1.0}, {"a": -1.0}),
    ],
)
def test_what_cannot_be(make):
    with pytest.raises(UserError, match="must"):
        make()


def test_unknown_names_are_listed():
    with pytest.raises(UserError, match="Satisficing names 'c'; the rewards are a, b"):
        Satisficing({"c": 1.0}).check(["a", "b"])
