"""Multipliers: which way they move, what they weigh, what a checkpoint keeps, and the optimum they find."""

import math

import pytest
import torch

from lit_rlhf.functional.constrained import AtLeast, AtMost, Equal
from lit_rlhf.functional.control import PID, MomentumSGD
from lit_rlhf.modules.multipliers import Dual, Multipliers
from lit_rlhf.types import UserError

SGD = MomentumSGD(lr=1.0, momentum=0.0, max_norm=math.inf, bound=20.0)


@pytest.mark.parametrize(("kind", "below"), [(AtLeast, 1), (AtMost, -1), (Equal, 1)])
def test_each_sense_moves_its_own_way(kind, below):
    """At multiplier 0 the slope of sigmoid is 1/4 and that of tanh 1."""
    slope = 1.0 if kind is Equal else 0.25
    for value in (0.5, 3.5):
        multipliers = Multipliers([kind("a", 2.0)], Dual(control=SGD))
        multipliers.update({"a": value})
        assert multipliers.report()["a"]["multiplier"] == pytest.approx(slope * below * (2.0 - value))


def test_names_and_not_places_tell_constraints_apart():
    first = Multipliers([AtLeast("a", 1.0), Equal("b", 0.0)], Dual(control=SGD))
    first.update({"b": -2.0, "a": 0.0})
    assert first.report()["a"]["multiplier"] == pytest.approx(0.25)
    assert first.report()["b"]["multiplier"] == pytest.approx(2.0)
    swapped = Multipliers([Equal("b", 0.0), AtLeast("a", 1.0)], Dual(control=SGD))
    swapped.load_state_dict(first.state_dict())
    assert swapped.report() == {"b": first.report()["b"], "a": first.report()["a"]}


@pytest.mark.parametrize("kind", [AtLeast, AtMost, Equal])
def test_pid_holds_on_while_the_violation_stays(kind):
    """The push of a constant error never lessens: the multiplier does not swing back by itself."""
    multipliers = Multipliers([kind("a", 0.8)], Dual(control=PID(kp=2.0, ki=0.2, kd=0.0, bound=3.0)))
    found = []
    for _ in range(12):
        multipliers.update({"a": 0.0 if kind is not AtMost else 1.6})
        found.append(multipliers.current().item())
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.8 * 2.2)


def test_memory_is_kept_with_the_multipliers():
    dual = Dual(control=PID(kp=0.3, ki=0.1, kd=0.2))
    straight, first = (Multipliers([Equal("a", 1.0)], dual) for _ in range(2))
    for value in (0.2, 0.4, 0.9):
        straight.update({"a": value})
    first.update({"a": 0.2})
    second = Multipliers([Equal("a", 1.0)], dual)
    second.load_state_dict(first.state_dict())
    for value in (0.4, 0.9):
        second.update({"a": value})
    assert second.report() == straight.report()


def test_the_mean_of_all_multipliers_weighs_where_it_was_asked_for():
    multipliers = Multipliers([Equal("a", 1.0)], Dual(control=SGD, average_iterates=True, init=0.0))
    assert multipliers.current().tolist() == [0]
    multipliers.update({"a": 0.0})  # to 1
    slope = 1 - math.tanh(1.0) ** 2
    multipliers.update({"a": 3.0})  # to 1 - 2 slope
    assert multipliers.current().item() == pytest.approx((1 + 1 - 2 * slope) / 2)
    assert multipliers.weights().item() == pytest.approx(math.tanh(1 - slope))


def test_the_mix_takes_signs_and_the_tasks_share():
    multipliers = Multipliers([AtLeast("a", 1.0), AtMost("b", 1.0)], Dual(init=math.log(3)))  # sigmoid is 3/4
    mixed = multipliers.mix(torch.tensor([[[2.0, 10.0, 100.0]]]))
    assert mixed.item() == pytest.approx((2 - 1.5) * 2 + 0.75 * 10 - 0.75 * 100)
    assert multipliers.task_weight == pytest.approx(0.5)
    assert multipliers.metrics()["objective/task_weight"] == pytest.approx(0.5)
    assert Multipliers([], Dual()).mix(torch.tensor([[[2.0]]])).item() == 2
    assert Multipliers([], Dual()).metrics() == {}


def test_reward_minus_cost_has_an_exponentiated_multiplier():
    multipliers = Multipliers([AtMost("cost", 1.0)], Dual(SGD, form="reward_minus_cost", init=math.log(3)))
    assert multipliers.weights().item() == pytest.approx(3)
    assert multipliers.mix(torch.tensor([[[2.0, 10.0]]])).item() == pytest.approx((2 - 30) / 4)
    multipliers.update({"cost": 1.5})
    assert multipliers.report()["cost"]["multiplier"] == pytest.approx(math.log(3) + 3 * 0.5)


def test_what_is_logged():
    multipliers = Multipliers([AtMost("a", 1.0)], Dual(control=MomentumSGD(lr=9.0, max_norm=math.inf, bound=0.5)))
    multipliers.update({"a": 3.0})
    found = multipliers.metrics()
    assert found["constraint/a/violation"] == 2
    assert found["constraint/a/multiplier"] == 0.5
    assert found["constraint/a/at_bound"] == 1
    assert found["constraint/a/threshold"] == 1
    assert found["constraint/a/value"] == 3
    multipliers.set_thresholds({"a": 4.0})
    assert multipliers.metrics()["constraint/a/violation"] == 0


def test_sixteen_bits_do_not_round_a_multiplier():
    multipliers = Multipliers([Equal("a", 1.0)], Dual(init=0.123456))
    assert multipliers.to(torch.bfloat16).report()["a"]["multiplier"] == pytest.approx(0.123456, rel=1e-6)


@pytest.mark.parametrize(
    ("constraints", "dual", "message"),
    [
        ([AtMost("a", 1.0), AtLeast("a", 0.0)], Dual(), "different names"),
        ([AtMost("a.b", 1.0)], Dual(), "without dots"),
        ([AtLeast("a", 1.0)], Dual(form="reward_minus_cost"), "an AtMost"),
    ],
)
def test_what_cannot_be(constraints, dual, message):
    with pytest.raises(UserError, match=message):
        Multipliers(constraints, dual)


@pytest.mark.parametrize("kind", [AtLeast, Equal])
def test_a_bandit_finds_its_constrained_optimum(kind):
    """Maximise -KL(pi || uniform) with E[r] = theta: pi is proportional to exp(k r), and k = w / (C - w) for C = 1.

    For r in {0, 1}, E[r] = sigmoid(k), so theta = sigmoid(0.4) needs k = 0.4 and a weight of 0.4 / 1.4.
    """
    known = 0.4
    theta, reward = torch.tensor(known).sigmoid().item(), torch.tensor([0.0, 1.0])
    multipliers = Multipliers([kind("r", theta)], Dual(control=MomentumSGD(lr=2.0, momentum=0.0, max_norm=math.inf)))
    logits = torch.zeros(2, requires_grad=True)
    for _ in range(1500):
        logps = logits.log_softmax(-1)
        probabilities = logps.detach().exp()
        streams = torch.stack([-(logps.detach() - math.log(0.5)), reward], -1)
        centred = streams - (probabilities[:, None] * streams).sum(0)
        (slope,) = torch.autograd.grad((probabilities * multipliers.mix(centred[:, None])[:, 0] * logps).sum(), logits)
        logits.data += 0.5 * slope
        multipliers.update({"r": float((probabilities * reward).sum())})
    weight = multipliers.weights().item()
    assert weight / multipliers.task_weight == pytest.approx(known, abs=1e-3)
    assert multipliers.values["r"] == pytest.approx(theta, abs=1e-3)
