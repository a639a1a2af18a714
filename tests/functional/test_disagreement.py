"""How members differ: by hand, by NumPy, and by what changes nothing."""

import numpy as np
import pytest
import torch

from lit_rlhf.functional.disagreement import correlation, lowest, products, spread


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
    assert correlation(products(torch.cat([x, torch.zeros_like(x)], 1))) == 0
