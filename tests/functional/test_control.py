"""Controllers: by hand, against the formulas, against PyTorch's own SGD, and what their state must carry."""

import dataclasses
import math

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_rlhf.errors import UserError
from lit_rlhf.functional.control import PID, AdaptiveKL, FixedKL, KLController, MomentumSGD, MultiplierControl
from lit_rlhf.specs import build, plain
from tests import reference_ppo as ref

KL_CONTROLLERS = [FixedKL(0.2), FixedKL(0.0), AdaptiveKL(0.2, target=0.5)]
MULTIPLIER_CONTROLS = [MomentumSGD(), MomentumSGD(momentum=0.0, max_norm=math.inf), PID(), PID(0.5, 0.2, 0.1)]
PIECES = [(KLController, c) for c in KL_CONTROLLERS] + [(MultiplierControl, c) for c in MULTIPLIER_CONTROLS]


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.5, 1.0),
        (0.55, 1.01),  # error 10 %, gain 0.1
        (0.45, 0.99),
        (50.0, 1.02),  # the error is clipped to 20 %
        (-1.0, 0.98),  # a measured KL may be negative
    ],
)
def test_adaptive_kl_by_hand(kl, factor):
    assert AdaptiveKL(0.2, target=0.5).next(0.3, kl) == pytest.approx(0.3 * factor)


def test_fixed_kl_stays():
    assert FixedKL(0.2).next(0.2, 99.0) == 0.2


def test_adaptive_kl_settles_at_its_target():
    """A policy whose KL is 0.1 / coefficient has the target 0.5 at 0.2."""
    controller, coefficient = AdaptiveKL(0.05, target=0.5), 0.05
    for _ in range(300):
        coefficient = controller.next(coefficient, 0.1 / coefficient)
    assert coefficient == pytest.approx(0.2, rel=1e-3)


def run(control, ascents, start=0.0):
    """Multipliers after each step, [steps, C]."""
    multipliers = torch.full(ascents.shape[1:], start, dtype=ascents.dtype)
    memory, found = torch.zeros(len(multipliers), control.memory_size, dtype=ascents.dtype), []
    for ascent in ascents:
        multipliers, memory = control.step(multipliers, memory, ascent)
        found.append(multipliers)
    return torch.stack(found)


def test_momentum_sgd_by_hand():
    """Gradients 0.4, then 0.2: memory 0.4, then 0.5 * 0.4 + 0.2 = 0.4; steps of 0.1 times that."""
    found = run(MomentumSGD(lr=0.1, momentum=0.5), torch.tensor([[0.4], [0.2]], dtype=torch.float64))
    assert found.flatten().tolist() == pytest.approx([0.04, 0.08])


def test_momentum_sgd_is_pytorchs_with_the_norm_clipped():
    ascents = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.1, maximize=True)
    expected = []
    for ascent in ascents:
        parameter.grad = ascent.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        optimizer.step()
        expected.append(parameter.detach().clone())
    torch.testing.assert_close(run(MomentumSGD(), ascents), torch.stack(expected), rtol=1e-5, atol=0)


def test_pid_agrees_with_the_formula_of_positions():
    errors = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = run(PID(kp=0.5, ki=0.2, kd=0.1), errors, start=0.3)
    assert found[:, 0].tolist() == pytest.approx(ref.pid(0.3, errors[:, 0].tolist(), 0.5, 0.2, 0.1).tolist())


def test_integral_control_alone_is_plain_gradient_ascent():
    ascents = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sgd = MomentumSGD(lr=0.2, momentum=0.0, max_norm=math.inf)
    torch.testing.assert_close(run(PID(kp=0.0, ki=0.2), ascents), run(sgd, ascents))


@pytest.mark.parametrize("control", MULTIPLIER_CONTROLS, ids=repr)
def test_positive_ascent_moves_up_and_negative_down(control):
    found = run(control, torch.tensor([[0.3, -0.3, 0.0]]))[0]
    assert found[0] > 0 > found[1]
    assert found[2] == 0


@pytest.mark.parametrize("control", MULTIPLIER_CONTROLS, ids=repr)
def test_multipliers_stop_at_the_bound_say_so_and_come_back_at_once(control):
    """A hundred steps up against the bound leave no stored push: the first step down leaves it."""
    up, down = torch.full((100, 2), 3.0), torch.full((2, 2), -3.0)
    found = run(dataclasses.replace(control, bound=1.0), torch.cat([up, down]))
    assert found.max() == 1
    assert dataclasses.replace(control, bound=1.0).at_bound(found[99]).tolist() == [True, True]
    assert (found[100] < 1).all()
    assert not dataclasses.replace(control, bound=1.0).at_bound(torch.tensor([0.99])).any()


@pytest.mark.parametrize("control", MULTIPLIER_CONTROLS, ids=repr)
def test_multipliers_and_memory_are_the_whole_state(control):
    """Ten steps are five, a copy of both, and five more; what is handed in is left alone."""
    ascents = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    multipliers, memory = torch.zeros(2), torch.zeros(2, control.memory_size)
    for ascent in ascents[:5]:
        before = multipliers.clone(), memory.clone()
        after = control.step(multipliers, memory, ascent)
        assert torch.equal(multipliers, before[0])
        assert torch.equal(memory, before[1])
        multipliers, memory = after
    multipliers, memory = multipliers.clone(), memory.clone()
    for ascent in ascents[5:]:
        multipliers, memory = control.step(multipliers, memory, ascent)
    assert torch.equal(multipliers, run(control, ascents)[-1])


def test_no_gradient_at_all_moves_nothing():
    assert not run(MomentumSGD(), torch.zeros(3, 2)).any()


@pytest.mark.parametrize(("base", "piece"), PIECES, ids=[repr(piece) for _, piece in PIECES])
def test_frozen_documented_and_brought_back_by_configs_and_checkpoints(base, piece):
    for field in dataclasses.fields(piece):
        assert f"{field.name}:" in type(piece).__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(piece, field.name, None)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--piece", type=base)
    config = parser.parse_object({"piece": plain(piece)})
    again = parser.parse_string(parser.dump(config))
    assert parser.instantiate(config).piece == parser.instantiate(again).piece == piece == build(plain(piece), base)


@pytest.mark.parametrize("base", [KLController, MultiplierControl])
def test_every_class_has_a_row(base):
    assert set(base.__subclasses__()) == {type(piece) for family, piece in PIECES if family is base}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKL(-0.1), r"FixedKL: coefficient must be >= 0 and finite, got -0\.1"),
        (lambda: AdaptiveKL(0.0, target=1.0), "AdaptiveKL: coefficient must be > 0 and finite"),
        (lambda: AdaptiveKL(0.1, target=0.0), "AdaptiveKL: target must be > 0 and finite, got 0"),
        (lambda: AdaptiveKL(0.1, target=1.0, gain=5.0), r"gain must be > 0 and below 1 / clip = 5, got 5\.0"),
        (lambda: AdaptiveKL(0.1, target=1.0, clip=0.0), "clip must be > 0 and finite, got 0"),
        (lambda: MomentumSGD(lr=0.0), "MomentumSGD: lr must be > 0 and finite, got 0"),
        (lambda: MomentumSGD(momentum=1.0), r"momentum must be in \[0, 1\), got 1\.0"),
        (lambda: MomentumSGD(max_norm=0.0), "max_norm must be > 0, got 0"),
        (lambda: MomentumSGD(bound=0.0), "bound must be > 0, got 0"),
        (lambda: PID(kp=-1.0), r"PID: kp must be >= 0 and finite, got -1\.0"),
        (lambda: PID(kp=0.0, ki=0.0), "PID: ki must be > 0 where kp and kd are 0"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
