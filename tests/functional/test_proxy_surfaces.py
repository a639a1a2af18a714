"""Proxy points: surfaces with a known top are found again, and never beyond what was seen."""

import numpy as np
import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.functional.proxy_points import GaussianProcess, Polynomial, individual_point, joint_point

TOP = np.array([0.6, -1.5])


def hill(points, noise=0.0, seed=0):
    """3 at TOP, falling off as a paraboloid with unequal axes and a slant."""
    a, b = (points - TOP).T
    return 3 - a**2 - 0.25 * b**2 - 0.2 * a * b + noise * np.random.default_rng(seed).normal(size=len(points))


def cloud(count, seed=0):
    """Points of two rewards that move together, correlation 0.6, on different scales."""
    covariance = np.array([[1.0, 1.2], [1.2, 4.0]])
    return np.random.default_rng(seed).multivariate_normal([0.3, -1.0], covariance, count)


@pytest.mark.parametrize("surface", [Polynomial(2), Polynomial(10), GaussianProcess()])
def test_a_known_top_is_found(surface):
    points = cloud(150)
    found = joint_point(points, hill(points), surface)
    assert found.values == pytest.approx(TOP, abs=0.12)
    assert found.gold == pytest.approx(3, abs=0.02)
    assert 0 < found.density <= 1


@pytest.mark.parametrize(("surface", "near"), [(Polynomial(2), 0.3), (GaussianProcess(0.0), 0.5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_moves_the_top_a_little(surface, near, seed):
    points = cloud(150, seed)
    found = joint_point(points, hill(points, 0.3, seed), surface)
    assert (np.abs(np.array(found.values) - TOP) / points.std(0) < near).all()


def test_a_minimum_is_not_taken_for_the_top():
    points = cloud(150)
    for surface in (Polynomial(2), GaussianProcess()):
        found = joint_point(points, -hill(points), surface)
        assert -hill(np.array([found.values]))[0] > -1  # a rim, not the -3 of the middle


@pytest.mark.parametrize("surface", [Polynomial(1), Polynomial(10), GaussianProcess()])
def test_a_slope_ends_where_the_points_thin_out(surface):
    points = cloud(200)
    found = joint_point(points, points @ [1.0, 1.0], surface, dense=0.1)
    outermost = np.sort(points @ [1.0, 1.0])
    assert outermost[100] < sum(found.values) < outermost[-1]
    wider = joint_point(points, points @ [1.0, 1.0], surface, dense=0.0)
    assert sum(wider.values) > sum(found.values)
    assert wider.density < found.density


def test_the_density_mask_keeps_a_wild_polynomial_where_points_are():
    points = cloud(250)
    gold = hill(points, 0.3)
    inside = joint_point(points, gold, Polynomial(10), dense=0.2)
    mean, _ = Polynomial(10).predict(points, gold, np.array([[points[:, 0].max(), points[:, 1].min()]]))
    assert abs(mean[0] - 3) > 10  # in an empty corner the fit is worth nothing
    assert inside.gold < 4


def test_the_process_is_the_textbooks():
    """Posterior of two noiseless points by hand, at the lengths that were fitted to many more."""
    x = np.linspace(0, 6, 40)
    points, gold = np.stack([x, np.cos(3 * x)], 1), np.sin(x)
    mean, sd = GaussianProcess().predict(points, gold, points)
    np.testing.assert_allclose(mean, gold, atol=1e-2)
    assert sd.max() < 0.05
    far, unsure = GaussianProcess().predict(points, gold, np.array([[60.0, 30.0]]))
    assert far[0] == pytest.approx(gold.mean(), abs=1e-6)  # nothing known: the mean of all
    assert unsure[0] > 0.5 * gold.std()
    assert unsure[0] > 20 * sd.max()


def test_the_process_knows_the_noise():
    points = cloud(300)
    gold = hill(points, 0.5)
    mean, sd = GaussianProcess().predict(points, gold, points)
    inner = np.abs((points - points.mean(0)) / points.std(0)).max(1) < 1
    assert np.abs(mean - hill(points))[inner].mean() < 0.2  # the noise is 0.5
    assert 0.02 < sd[inner].mean() < 0.25


def test_pessimism_stays_nearer_to_what_was_seen():
    points = cloud(60)
    gold = 0.1 * points @ [1.0, 0.5] + 0.3 * np.random.default_rng(1).normal(size=60)
    bold, shy = (joint_point(points, gold, GaussianProcess(p), dense=0.0) for p in (0.0, 20.0))
    assert shy.sd < bold.sd
    assert shy.density > bold.density


@pytest.mark.parametrize(("count", "axes", "degree"), [(17, 2, 1), (18, 2, 2), (198, 2, 10), (197, 2, 9), (5, 2, 0)])
def test_the_degree_is_what_the_points_allow(count, axes, degree):
    assert Polynomial(10).used(count, axes) == degree  # 3 x (6, 66, 55 coefficients)


def test_a_unit_is_a_unit():
    """Other units of rewards and gold move the point by the same map."""
    points, scale, shift = cloud(120), np.array([10.0, 0.01]), np.array([-3.0, 40.0])
    for surface in (Polynomial(3), GaussianProcess()):
        one = joint_point(points, hill(points, 0.1), surface)
        two = joint_point(points * scale + shift, 7 * hill(points, 0.1) - 2, surface)
        np.testing.assert_allclose(np.array(two.values), np.array(one.values) * scale + shift, rtol=1e-3)
        assert two.gold == pytest.approx(7 * one.gold - 2, rel=1e-3)


def test_the_individual_point_is_the_value_at_the_peak_of_the_mean():
    assert individual_point([0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 4.0, -1.0]) == (1, 1.0, 5.0)
    values, gold = [[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]], [[0.0, 3.0, 2.0], [0.0, 1.0, 4.0]]
    assert individual_point(values, gold) == (2, 3.0, 3.0)  # means of gold: 0, 2, 3


@pytest.mark.parametrize(
    ("points", "gold", "dense", "message"),
    [
        (np.zeros((20, 1)), np.zeros(20), 0.1, "D >= 2"),
        (cloud(11), np.zeros(11), 0.1, "needs 12 probes or more, got 11"),
        (cloud(20), np.zeros(19), 0.1, r"\(20, 2\) and \(19,\)"),
        (cloud(20), np.full(20, np.nan), 0.1, "finite"),
        (cloud(20), np.zeros(20), 1.0, "dense must be in"),
        (cloud(20) * [1, 0], np.zeros(20), 0.1, "one value in all probes"),
        (cloud(20)[:, :1] * [1, 2], np.zeros(20), 0.1, "move as one"),
    ],
)
def test_what_has_no_point_is_refused(points, gold, dense, message):
    with pytest.raises(UserError, match=message):
        joint_point(points, gold, Polynomial(), dense=dense)


def test_fields_are_checked():
    with pytest.raises(UserError, match="degree must be >= 1, got 0"):
        Polynomial(0)
    with pytest.raises(UserError, match="pessimism must be >= 0"):
        GaussianProcess(-1.0)
    with pytest.raises(UserError, match=r"\(1, 2\) and \(1, 3\)"):
        individual_point([1.0, 2.0], [1.0, 2.0, 3.0])
