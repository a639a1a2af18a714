"""How members differ: by hand, by NumPy, and by what changes nothing."""

import numpy as np
import pytest
import torch

from lit_rlhf.functional.disagreement import collapsed, correlation, lowest, mixture_logit, products, spread


def scores(rows=40, members=4, seed=0):
    return torch.randn(rows, members, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_spread_is_numpys_population_deviation():
    x = scores()
    np.testing.assert_allclose(spread(x), x.numpy().std(1), rtol=1e-12)
    assert torch.equal(spread(x[:, :1]), torch.zeros(40, dtype=torch.float64))
    torch.testing.assert_close(spread(x + 3), spread(x))
    torch.testing.assert_close(spread(2 * x), 2 * spread(x))


def test_the_lowest_member_takes_all_and_ties_share():
    assert lowest(torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 1.0]])).tolist() == [[0, 1, 0], [0.5, 0, 0.5]]
    x = scores()
    assert torch.equal(lowest(x).sum(1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(lowest(x).argmax(1), x.argmin(1))


def test_correlation_is_numpys_mean_over_pairs():
    x = scores() + scores(members=1, seed=1)
    matrix = np.corrcoef(x.numpy().T)
    expected = matrix[np.triu_indices(4, 1)].mean()
    assert correlation(products(x)).item() == pytest.approx(expected, rel=1e-10)
    assert correlation(products(3 * x + torch.arange(4))).item() == pytest.approx(expected, rel=1e-10)
    parts = products(x[:13]) + products(x[13:])
    assert correlation(parts).item() == pytest.approx(expected, rel=1e-10)


def test_correlation_at_its_ends():
    x = scores(members=1)
    assert correlation(products(torch.cat([x, 2 * x], 1))).item() == pytest.approx(1, rel=1e-10)
    assert correlation(products(torch.cat([x, -x], 1))).item() == pytest.approx(-1, rel=1e-10)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_a_constant_member_correlates_with_nothing(constant):
    x = scores(members=2)
    assert correlation(products(torch.cat([x, torch.full_like(x[:, :1], constant)], 1))) is None
    assert correlation(products(torch.cat([x, constant + 1e-2 * x[:, :1]], 1))) is not None


def test_collapsed_is_a_spread_of_rounding_noise():
    noise = torch.full((400,), 31.4159).add(1e-7 * torch.randn(400, generator=torch.Generator().manual_seed(0)))
    live = 31.4159 + 1e-3 * scores(400, 1)[:, 0]
    found = [collapsed(x.double().mean(), x.double().std()).item() for x in (noise, live, 0 * live)]
    assert found == [True, False, True]


def test_the_mixture_of_one_member_is_its_own_logit_and_of_two_lies_between():
    x = scores(members=2)
    torch.testing.assert_close(mixture_logit(x[:, :1]), x[:, 0])
    expected = torch.logit(torch.sigmoid(x).mean(1))
    torch.testing.assert_close(mixture_logit(x), expected)
    torch.testing.assert_close(mixture_logit(-x), -expected)
    # 3/4 and 1/4 make 1/2; members sure of opposite things know nothing
    assert mixture_logit(torch.tensor([[3.0, 1 / 3], [9.0, 1 / 9]]).log()).abs().max() < 1e-6
    assert mixture_logit(torch.tensor([[500.0, 500.0], [-500.0, -500.0]])).tolist() == [500, -500]
