"""KL estimates by hand, against the formula, and against the exact KL of a small categorical."""

import math

import pytest
import torch

from lit_rlhf.functional.policy_gradient import kl_estimates
from tests import reference as ref


def test_by_hand():
    """Log-ratios u = ln 2 and -ln 2; a third token does not count and is NaN on purpose.

    k1 = ln 2 - ln 2 = 0;   k2 = 2 * ln(2)^2 / 2 = ln(2)^2;   k3 = (1/2 - 1 + ln 2) + (2 - 1 - ln 2) = 1/2
    """
    ln2 = math.log(2)
    logps = torch.tensor([[ln2, -ln2, torch.nan]], dtype=torch.float64)
    found = kl_estimates(logps, torch.zeros_like(logps), torch.tensor([[True, True, False]]))
    assert {name: float(value) for name, value in found.items()} == pytest.approx({"k1": 0.0, "k2": ln2**2, "k3": 0.5})


def test_agrees_with_the_formula():
    g = torch.Generator().manual_seed(0)
    logps, reference = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=g) < 0.7
    found = kl_estimates(logps, reference, mask)
    for i in range(4):
        expected = ref.kl_estimates(logps[i].tolist(), reference[i].tolist(), mask[i].tolist())
        assert {name: float(value[i]) for name, value in found.items()} == pytest.approx(expected, rel=1e-12)


def test_a_policy_equal_to_its_reference_has_none():
    logps = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert all(not value.any() for value in kl_estimates(logps, logps, torch.ones(3, 5, dtype=torch.bool)).values())


def test_k1_and_k3_meet_the_exact_kl_and_k2_nearly():
    """Policy (1/2, 1/4, 1/4), reference (1/4, 1/4, 1/2): KL = 1/2 ln 2 + 1/4 ln(1/2) = ln(2) / 4 a token, 5 tokens.

    Expectations are exact: every first token weighted by its probability. k2 gives (1/2 + 1/4) ln(2)^2 / 2.
    """
    p, q = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    tokens = torch.arange(3)[:, None].expand(3, 5)
    found = kl_estimates(p.log()[tokens], q.log()[tokens], torch.ones(3, 5, dtype=torch.bool))
    expected = {name: float((p * value).sum()) for name, value in found.items()}
    assert expected["k1"] == pytest.approx(5 * math.log(2) / 4, rel=1e-12)
    assert expected["k3"] == pytest.approx(5 * math.log(2) / 4, rel=1e-12)
    assert expected["k2"] == pytest.approx(5 * 0.75 * math.log(2) ** 2 / 2, rel=1e-12)


def test_padding_changes_nothing():
    g = torch.Generator().manual_seed(0)
    logps, reference = torch.randn(2, 2, 4, generator=g)
    mask = torch.ones(2, 4, dtype=torch.bool)
    plain = kl_estimates(logps, reference, mask)
    padded = kl_estimates(*(torch.nn.functional.pad(x, (2, 3), value=9.0) for x in (logps, reference)),
                          torch.nn.functional.pad(mask, (2, 3)))  # fmt: skip
    assert all(torch.equal(plain[name], padded[name]) for name in plain)


def test_finite_at_a_hundred_nats_in_float32():
    logps = torch.tensor([[100.0], [-100.0]])
    found = kl_estimates(logps, torch.zeros_like(logps), torch.ones(2, 1, dtype=torch.bool))
    assert all(value.isfinite().all() for value in found.values())
    assert found["k3"].tolist() == pytest.approx([99.0, math.exp(100) - 101])
