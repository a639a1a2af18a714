"""Preference losses: hand-derived values, agreement with the papers' formulas, gradients, labels and limits.

The one pair of `CASES` is chosen for clean algebra. Log-ratios are h_w = ln 3 over 4 tokens and h_l = -ln 3 over 2, so
the margin is 2 ln 3, and per token ln 3 / 4 + ln 3 / 2 = 0.75 ln 3; the policy's chosen log-probability is -8.
With beta = 0.5, u = beta * margin = ln 3, sigmoid(u) = 3/4, and the loss of the swapped pair has sigmoid(-u) = 1/4.
"""

import math
import warnings

import numpy as np
import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.functional.preference import DPO, IPO, RDPO, RPO, LogRatios, PreferenceLoss, SLiC, bradley_terry
from lit_rlhf.types import PairLogps
from tests import reference as ref

LN3, LN4 = math.log(3), math.log(4)
DPO_HALF = math.log(4 / 3)  # -log(3/4)

# loss, its value on the pair, where the value comes from
CASES = [
    (DPO(0.5), DPO_HALF, "-log sigmoid(ln 3) = -log(3/4)"),
    (DPO(0.5, label_smoothing=0.25), 0.75 * DPO_HALF + 0.25 * LN4, "3/4 of -log(3/4) and 1/4 of -log(1/4)"),
    (IPO(0.5), (2 * LN3 - 1) ** 2, "margin 2 ln 3, target 1 / (2 * 0.5) = 1"),
    (IPO(0.5, convention="daa"), (LN3 - 1) ** 2, "u = ln 3, target 1"),
    (IPO(0.5, length_average=True), (0.75 * LN3 - 1) ** 2, "margin per token 0.75 ln 3, target 1"),
    (IPO(0.5, "daa", length_average=True), (0.375 * LN3 - 1) ** 2, "u = 0.5 * 0.75 ln 3, target 1"),
    (SLiC(0.25), 1 - LN3 / 2, "u = 0.25 * 2 ln 3 = 0.549 < 1"),
    (SLiC(0.5), 0.0, "u = ln 3 = 1.099 > 1"),
    (RDPO(0.5, alpha=LN3 / 2), math.log(10 / 9), "u = ln 3 + (ln 3 / 2) * (4 - 2) = ln 9, sigmoid = 9/10"),
    (RPO(DPO(0.5), eta=0.25), DPO_HALF + 1, "anchor 0.25 * 0.5 * 8 = 1"),
    (RPO(DPO(0.5), eta=0.25, reduction="mean"), DPO_HALF + 0.25, "anchor 0.25 * 0.5 * 8 / 4 = 0.25"),
    (RPO(IPO(0.5), eta=0.25), (2 * LN3 - 1) ** 2 + 1, "IPO and the same anchor"),
    (RPO(SLiC(0.5), eta=0.25), 1.0, "SLiC is 0 there, the anchor 1"),
]
LOSSES = [case[0] for case in CASES]
NAMES = [repr(loss) for loss in LOSSES]
FORMULAS = {DPO: ref.dpo, IPO: ref.ipo, SLiC: ref.slic, RDPO: ref.rdpo}


def pairs(size=6, seed=0, scale=3.0):
    """Random float64 pairs (policy, reference), gradients wanted for the policy."""
    g = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(4, size, generator=g, dtype=torch.float64) - 10
    lengths = torch.randint(1, 9, (2, size), generator=g)
    policy = PairLogps(values[0].requires_grad_(), values[1].requires_grad_(), *lengths)
    return policy, PairLogps(values[2], values[3], *lengths)


def hand_pair():
    def t(x):
        return torch.tensor([x], dtype=torch.float64)

    lengths = (torch.tensor([4]), torch.tensor([2]))
    return PairLogps(t(-8.0), t(-5.0), *lengths), PairLogps(t(-8.0 - LN3), t(-5.0 + LN3), *lengths)


def swap(pair):
    return PairLogps(pair.rejected, pair.chosen, pair.rejected_length, pair.chosen_length)


def reference_of(loss):
    """The NumPy formula for a loss object: a function of (w, l, w0, l0, nw, nl)."""
    if isinstance(loss, RPO):
        base, arguments = function_of(loss.base)
        return lambda *p: ref.rpo(*p, base=base, eta=loss.eta, reduction=loss.reduction, **arguments)
    function, arguments = function_of(loss)
    return lambda *p: function(*p, **arguments)


def function_of(loss):
    return FORMULAS[type(loss)], dict(vars(loss))


@pytest.mark.parametrize(("loss", "expected", "why"), CASES, ids=NAMES)
def test_value_by_hand(loss, expected, why):
    output = loss(*hand_pair())
    torch.testing.assert_close(output.loss, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_losses_and_gradients_agree_with_the_papers(loss):
    if type(getattr(loss, "base", loss)) not in FORMULAS:
        pytest.skip("no formula in tests/reference.py: the hand-derived row stands alone")
    policy, reference = pairs()
    output = loss(policy, reference).loss
    output.sum().backward()
    formula = reference_of(loss)
    columns = (policy.chosen, policy.rejected, reference.chosen, reference.rejected, *list(vars(policy).values())[2:])
    rows = torch.stack([c.detach().double() for c in columns], 1).tolist()
    slopes = torch.stack([policy.chosen.grad, policy.rejected.grad], 1)
    for (w, l, *rest), value, slope in zip(rows, output.tolist(), slopes, strict=True):  # noqa: E741
        assert value == pytest.approx(formula(w, l, *rest), rel=1e-9, abs=1e-12)
        expected = ref.numeric_gradient(lambda x, rest=rest: formula(*x, *rest), np.array([w, l]))
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_reference_gets_no_gradient(loss):
    policy, reference = pairs()
    reference = PairLogps(reference.rejected.clone().requires_grad_(), *list(vars(reference).values())[1:])
    loss(policy, reference).loss.sum().backward()
    assert reference.chosen.grad is None


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_metrics_by_hand(loss):
    """Implicit rewards are beta times the summed log-ratio for every loss: +-beta ln 3, margin 2 beta ln 3."""
    output = loss(*hand_pair())
    expected = {
        "rewards/chosen": loss.beta * LN3,
        "rewards/rejected": -loss.beta * LN3,
        "rewards/margins": 2 * loss.beta * LN3,
        "rewards/accuracies": 1.0,
        "logps/chosen": -8.0,
        "logps/rejected": -5.0,
    }
    assert set(output.metrics) == {*expected, "loss/preference", "loss/sft"}
    for name, value in expected.items():
        assert float(output.metrics[name]) == pytest.approx(value, rel=1e-12), name
    assert float(output.metrics["loss/preference"] + output.metrics["loss/sft"]) == pytest.approx(float(output.loss))
    assert not any(value.requires_grad for value in loss(*pairs()).metrics.values())


def test_a_tie_counts_half():
    policy, _ = hand_pair()
    assert DPO(0.1)(policy, policy).metrics["rewards/accuracies"].tolist() == [0.5]
    assert DPO(0.1)(*map(swap, hand_pair())).metrics["rewards/accuracies"].tolist() == [0.0]


def test_step_zero():
    """Policy equal to reference: DPO is log 2, RPO log 2 - eta beta logp_w = log 2 + 0.2 * 0.5 * 8."""
    policy, _ = hand_pair()
    assert float(DPO(0.5)(policy, policy).loss) == pytest.approx(math.log(2), rel=1e-12)
    assert float(RPO(DPO(0.5), 0.2)(policy, policy).loss) == pytest.approx(math.log(2) + 0.8, rel=1e-12)


@pytest.mark.parametrize("base", [DPO(0.1, 0.2), IPO(0.1), IPO(0.3, "daa"), SLiC(0.2), RDPO(0.1, 0.05)], ids=repr)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("soft", [False, True])
def test_eta_zero_is_bitwise_the_base(base, reduction, soft):
    label = torch.linspace(0, 1, 6) if soft else None
    found = []
    for loss in (base, RPO(base, 0.0, reduction)):
        policy, reference = pairs()
        output = loss(policy, reference, label=label)
        output.loss.sum().backward()
        found.append((output.loss, policy.chosen.grad, policy.rejected.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_alpha_zero_is_bitwise_dpo():
    assert torch.equal(RDPO(0.3, 0.0)(*pairs()).loss, DPO(0.3)(*pairs()).loss)


@pytest.mark.parametrize("eta", [0.005, 0.2])
def test_the_anchor_overtakes_where_the_paper_says(eta):
    """The slope in logp_w is -beta (sigmoid(-m) + eta): equal shares at sigmoid(-m) = eta, m = log((1 - eta) / eta).

    That is m = 5.29 for eta 0.005 and 1.39 for 0.2.
    """
    beta, m = 0.5, math.log((1 - eta) / eta)
    assert m == pytest.approx({0.005: 5.293, 0.2: 1.386}[eta], abs=1e-3)
    chosen = torch.tensor([m / beta], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    reference = PairLogps(zero, zero, one, one)
    RPO(DPO(beta), eta)(PairLogps(chosen, zero, one, one), reference).loss.sum().backward()
    assert float(chosen.grad) == pytest.approx(-2 * beta * eta, rel=1e-12)


def test_ipo_conventions_differ_as_the_papers_do():
    """(m - 1/(2b))^2 = ((2b m - 1) / (2b))^2: standard with b is daa with 2b, over (2b)^2."""
    standard, daa = IPO(0.1)(*pairs()).loss, IPO(0.2, "daa")(*pairs()).loss
    torch.testing.assert_close(standard, daa / 0.2**2)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_soft_labels_mix_the_pair_and_its_swap(loss):
    policy, reference = pairs()
    label = torch.tensor([1.0, 0.0, 0.5, 0.9, 0.1, 0.3], dtype=torch.float64)
    mixed = loss(policy, reference, label=label)
    given, swapped = loss(policy, reference), loss(swap(policy), swap(reference))
    expected = label * given.metrics["loss/preference"] + (1 - label) * swapped.metrics["loss/preference"]
    torch.testing.assert_close(mixed.metrics["loss/preference"], expected)
    assert torch.equal(mixed.metrics["loss/sft"], given.metrics["loss/sft"])  # the anchor stays on the chosen response
    assert torch.equal(loss(policy, reference, label=torch.ones(6)).loss, given.loss)


def test_label_smoothing_is_a_soft_label():
    label = torch.full((6,), 0.8, dtype=torch.float64)
    torch.testing.assert_close(DPO(0.1, 0.2)(*pairs()).loss, DPO(0.1)(*pairs(), label=label).loss)


def test_half_precision_is_computed_in_float32():
    policy, reference = hand_pair()

    def cast(pair, dtype):
        return PairLogps(pair.chosen.to(dtype), pair.rejected.to(dtype), pair.chosen_length, pair.rejected_length)

    assert DPO(0.5)(cast(policy, torch.bfloat16), cast(reference, torch.bfloat16)).loss.dtype == torch.float32
    assert DPO(0.5)(policy, reference).loss.dtype == torch.float64


def test_an_empty_response_divides_by_nothing():
    zero, none = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    pair = PairLogps(zero, zero, none, none)
    assert IPO(1.0, length_average=True)(pair, pair).loss.tolist() == [0.25]
    assert LogRatios(zero, zero, none, none).mean_margin.tolist() == [0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(0.0), r"DPO: beta must be > 0 and finite, got 0\.0"),
        (lambda: DPO(float("nan")), "beta must be > 0"),
        (lambda: SLiC(-1.0), r"SLiC: beta must be > 0 and finite, got -1\.0"),
        (lambda: DPO(0.1, label_smoothing=0.5), r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        (lambda: IPO(0.1, convention="sum"), "convention must be 'standard' or 'daa', got 'sum'"),
        (lambda: RDPO(0.1, alpha=-0.1), r"alpha must be >= 0 and finite, got -0\.1"),
        (lambda: RPO(DPO(0.1), eta=-1.0), r"RPO: eta must be >= 0 and finite, got -1\.0"),
        (lambda: RPO(DPO(0.1), eta=0.1, reduction="max"), "reduction must be 'sum' or 'mean', got 'max'"),
        (lambda: RPO(RPO(DPO(0.1), 0.1), 0.1), "base must be a PreferenceLoss without an anchor of its own"),
        (lambda: RPO({"beta": 0.1}, 0.1), "base must be a PreferenceLoss"),
    ],
)
def test_fields_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_rpo_over_a_length_average_warns():
    with pytest.warns(UserWarning, match="its margin is per token"):
        RPO(IPO(0.1, length_average=True), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RPO(IPO(0.1), 0.1)


def test_every_loss_is_a_preference_loss():
    assert all(isinstance(loss, PreferenceLoss) for loss in LOSSES)


# c, r, arguments, loss, where the value comes from
SCORES = [
    (LN3, 0.0, {}, DPO_HALF, "-log(3/4)"),
    (LN3, 0.0, {"margin": 2 * LN3}, LN4, "c - r - margin = -ln 3, -log(1/4)"),
    (2.0, 2.0, {"centering": 0.01}, math.log(2) + 0.16, "0.01 * 4^2"),
    (2.0, 2.0, {"l2": 0.5}, math.log(2) + 2, "0.5 * (4 + 4) / 2"),
    (LN3, 0.0, {"label": 0.75}, 0.75 * DPO_HALF + 0.25 * LN4, "as smoothed DPO"),
    (LN3, 0.0, {"label": 0.0, "margin": LN3}, math.log(10), "swapped: -ln 3 - ln 3 = -ln 9, -log(1/10)"),
]


@pytest.mark.parametrize(("chosen", "rejected", "arguments", "expected", "why"), SCORES)
def test_bradley_terry_by_hand(chosen, rejected, arguments, expected, why):
    tensors = {
        k: torch.tensor([v], dtype=torch.float64) if k in {"label", "margin"} else v for k, v in arguments.items()
    }
    c, r = (torch.tensor([v], dtype=torch.float64) for v in (chosen, rejected))
    output = bradley_terry(c, r, **tensors)
    assert float(output.loss) == pytest.approx(expected, rel=1e-12)
    assert set(output.metrics) == {"reward/accuracy", "reward/margin", "reward/mean", "loss/preference"}
    assert float(output.metrics["reward/margin"]) == pytest.approx(chosen - rejected)
    assert float(output.metrics["reward/mean"]) == pytest.approx((chosen + rejected) / 2)


def test_bradley_terry_agrees_with_the_formula():
    g = torch.Generator().manual_seed(0)
    c, r, margin = 2 * torch.randn(3, 5, generator=g, dtype=torch.float64)
    c, r = c.requires_grad_(), r.requires_grad_()
    output = bradley_terry(c, r, margin, 0.01, 0.001).loss
    output.sum().backward()
    rows = torch.stack([x.detach() for x in (c, r, margin, output, c.grad, r.grad)], 1).tolist()
    for c_i, r_i, margin_i, value, *slope in rows:
        arguments = (margin_i, 0.01, 0.001)
        assert value == pytest.approx(ref.bradley_terry(c_i, r_i, *arguments), rel=1e-9)
        expected = ref.numeric_gradient(lambda x, a=arguments: ref.bradley_terry(*x, *a), np.array([c_i, r_i]))
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-8)


def test_bradley_terry_knows_no_origin():
    """A constant added to all scores changes nothing; with centring it does."""
    c, r = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 3.0]).double()
    torch.testing.assert_close(bradley_terry(c + 7, r + 7).loss, bradley_terry(c, r).loss)
    assert (bradley_terry(c + 7, r + 7, centering=0.1).loss > bradley_terry(c, r, centering=0.1).loss).all()


def test_bradley_terry_is_finite_far_out_and_counts_ties_half():
    c, r = torch.tensor([100.0, -100.0, 1.0]), torch.tensor([-100.0, 100.0, 1.0])
    output = bradley_terry(c, r)
    torch.testing.assert_close(output.loss, torch.tensor([0.0, 200.0, math.log(2)]))
    assert output.metrics["reward/accuracy"].tolist() == [1.0, 0.0, 0.5]


def test_bradley_terry_refuses_negative_weights():
    with pytest.raises(UserError, match=r"centering must be >= 0 and finite, got -1\.0"):
        bradley_terry(torch.zeros(1), torch.zeros(1), centering=-1.0)
