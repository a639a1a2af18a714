"""Nelder-Mead by asking: the same points as a search that is not interrupted, and as the method written out."""

import json

import pytest
from scipy.optimize import minimize

from lit_rlhf.functional.nelder_mead import propose, right_simplex
from tests import reference_ppo as ref

SIMPLEX = right_simplex([0.0, 0.0], [1.0, 1.0])
TOLERANCE = [0.01, 0.01]


def hill(point):
    """Highest at (2.13, 0.94), where it is 3; twice as steep along the second axis, and tilted; no ties on the way."""
    x, y = point[0] - 2.13, point[1] - 0.94
    return 3.0 - x * x - 2 * y * y - x * y


def search(score, simplex=SIMPLEX, tolerance=TOLERANCE, *, limit=300, known=()):
    """Ask and score until the search ends; return all evaluations."""
    evaluations = list(known)
    while (point := propose(evaluations, simplex, tolerance)) is not None:
        assert len(evaluations) < limit
        evaluations.append((point, score(point)))
    return evaluations


def test_asks_for_the_start_simplex_first_then_reflects_the_worst():
    """The corner is the lowest; it goes through the middle (1/2, 1/2) of the others to (1, 1)."""
    asked = [point for point, _ in search(hill)]
    assert asked[:3] == [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    assert asked[3] == pytest.approx((1.0, 1.0))


def test_asks_for_the_points_of_the_method_written_out():
    asked = [point for point, _ in search(hill, tolerance=[1e-9, 1e-9])][:40]
    expected = ref.nelder_mead(lambda point: -hill(point), SIMPLEX, iterations=30)[:40]
    assert len(asked) == 40
    for found, point in zip(asked, expected, strict=True):
        assert found == pytest.approx(point, rel=1e-6, abs=1e-9)


def test_finds_the_top_and_says_when_it_is_there():
    evaluations = search(hill)
    point, score = max(evaluations, key=lambda row: row[1])
    assert point == pytest.approx((2.13, 0.94), abs=0.02)
    assert score == pytest.approx(3.0, abs=1e-3)
    assert len(evaluations) < 60


def test_it_is_scipys_search_with_the_sign_turned():
    """Tolerances too small for the cache to act: point by point what one uninterrupted call asks for."""
    asked = []

    def cost(x):
        asked.append(tuple(x))
        return -hill(x)

    minimize(cost, SIMPLEX[0], method="Nelder-Mead", options={"initial_simplex": SIMPLEX, "maxfev": 40})
    evaluations = search(hill, tolerance=[1e-12, 1e-12], limit=500)
    for (found, _), expected in zip(evaluations, asked[:30], strict=False):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_resumed_from_a_file_it_asks_for_the_same_points(stop):
    whole = search(hill)
    kept = [(tuple(point), score) for point, score in json.loads(json.dumps(whole[:stop]))]
    assert search(hill, known=kept) == whole


def test_scores_are_only_compared():
    """Any rising function of the score asks for the same points and ends with them."""
    plain, bent = search(hill), search(lambda point: 10 + 1e9 * hill(point) ** 3)
    assert [point for point, _ in plain] == [point for point, _ in bent]


def test_axes_of_other_units_ask_for_the_same_points():
    """The second axis in thousands, its tolerance too."""
    scaled = search(
        lambda point: hill((point[0], point[1] / 1000)), right_simplex([0.0, 0.0], [1.0, 1000.0]), [0.01, 10.0]
    )
    plain = search(hill)
    assert len(scaled) == len(plain)
    for (found, _), (point, _) in zip(scaled, plain, strict=True):
        assert (found[0], found[1] / 1000) == pytest.approx(point, rel=1e-6, abs=1e-9)


def test_a_known_neighbour_lends_its_score_and_the_earliest_does():
    """(1.05, 0) is known before (1, 0) is asked for and within 0.1 of it; (1, 0) itself comes too late."""
    neighbour = ((1.05, 0.0), 7.0)
    asked = [point for point, _ in search(hill, tolerance=[0.1, 0.1], known=[neighbour])[1:]]
    assert (1.0, 0.0) not in asked
    late = [neighbour, ((1.0, 0.0), -99.0)]
    first = search(hill, tolerance=[0.1, 0.1], known=[neighbour])[1:]
    assert first == search(hill, tolerance=[0.1, 0.1], known=late)[2:]


def test_no_two_questions_are_within_the_tolerance_of_each_other():
    tolerance = [0.2, 0.1]
    asked = [point for point, _ in search(hill, tolerance=tolerance)]
    for i, a in enumerate(asked):
        for b in asked[:i]:
            assert any(abs(x - y) > t for x, y, t in zip(a, b, tolerance, strict=True))


def test_a_larger_tolerance_costs_fewer_questions():
    counts = [len(search(hill, tolerance=[t, t])) for t in (0.3, 0.1, 0.01, 0.001)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("score", [lambda point: 0.0, lambda point: round(hill(point))], ids=["flat", "steps"])
def test_equal_scores_end_too(score):
    assert 3 <= len(search(score)) < 100


def test_one_axis_is_enough():
    evaluations = search(lambda point: -((point[0] - 3.0) ** 2), right_simplex([0.0], [1.0]), [0.01])
    assert max(evaluations, key=lambda row: row[1])[0] == pytest.approx((3.0,), abs=0.02)


@pytest.mark.parametrize(
    ("evaluations", "simplex", "tolerance", "message"),
    [
        ([], SIMPLEX[:2], TOLERANCE, "do not fit"),
        ([], SIMPLEX, [0.1], "do not fit"),
        ([], SIMPLEX, [0.1, 0.0], r"tolerance must be > 0 and finite on every axis, got \[0.1, 0.0\]"),
        ([], [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], TOLERANCE, "must span all 2 axes"),
        ([((0.0, 0.0), float("nan"))], SIMPLEX, TOLERANCE, "must be finite"),
        ([((0.0,), 1.0)], SIMPLEX, TOLERANCE, "points must have 2 axes, got 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(evaluations, simplex, tolerance, message):
    with pytest.raises(ValueError, match=message):
        propose(evaluations, simplex, tolerance)
