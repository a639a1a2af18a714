"""The bag-of-words baseline: what it can know, what it cannot, and its gradient."""

import json

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.sparse import csr_matrix

from studies import bag_of_words


def write(path, pairs):
    rows = [{"prompt": f"p {i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_words_that_tell_are_found_and_ties_count_half(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", [(f"good {i}", f"bad {i}") for i in range(40)])
    held_out = write(tmp_path / "b.jsonl", [("good x", "bad y"), ("good", "bad"), ("bad", "good"), ("new", "words")])
    bag_of_words.main(train, held_out)
    assert capsys.readouterr().out.startswith("0.625 [")  # two right, one wrong, one tie


def test_two_words_in_a_row_are_features():
    assert list(bag_of_words.features("It's so-so, IT'S so")) == [
        "it", "'", "s", "so", "-", "so", ",", "it", "'", "s", "so",
        "it '", "' s", "s so", "so -", "- so", "so ,", ", it", "it '", "' s", "s so",
    ]  # fmt: skip


def test_the_weights_are_the_minimum():
    """One feature, three pairs for it and one against: softplus' slope is 0 where 3 (1 - p) = p, so w = log 3."""
    x = csr_matrix(np.array([[1.0], [1.0], [1.0], [-1.0]]))
    assert bag_of_words.fit(x, 0.0)[0] == pytest.approx(np.log(3), abs=1e-4)
    assert 0 < bag_of_words.fit(x, 1.0)[0] < np.log(3)
    assert 0 < bag_of_words.fit(x, 10.0)[0] < bag_of_words.fit(x, 1.0)[0]


def test_the_gradient_is_that_of_the_loss(monkeypatch):
    kept = {}
    monkeypatch.setattr(bag_of_words, "minimize", lambda f, start, **_: kept.update(f=f) or type("R", (), {"x": start}))
    x = csr_matrix(np.random.default_rng(0).normal(size=(9, 4)))
    bag_of_words.fit(x, 0.3)
    loss = kept["f"]
    w = np.array([0.3, -1.0, 0.5, 2.0])
    assert check_grad(lambda v: loss(v)[0], lambda v: loss(v)[1], w) < 1e-5


def test_words_seen_once_are_left_out(tmp_path):
    rows = bag_of_words.pairs(write(tmp_path / "a.jsonl", [("red fish", "blue fish"), ("red cat", "red dog")]))
    assert set(bag_of_words.vocabulary(rows)) == {"red", "fish"}
