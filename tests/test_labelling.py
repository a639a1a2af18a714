"""Labels by gold: the stated share is wrong, exactly, of pairs and of aspects apart."""

import pytest

from lit_rlhf.data.synthetic import World, WorldGold
from lit_rlhf.errors import UserError
from lit_rlhf.labelling import label_pairs

ROWS = World(5).preference_rows(200, noise=0.0)


def labelled(noise=0.0, aspect_noise=0.0, seed=0):
    return label_pairs(ROWS, WorldGold(), noise, seed, aspect_noise=aspect_noise)


def aspects(rows):
    return [value for row in rows for _, value in sorted(row["aspects"].items()) if value]


def test_exactly_the_stated_share_of_aspect_labels_is_wrong():
    true, noisy = aspects(labelled()), aspects(labelled(aspect_noise=0.25))
    assert len(true) > 400
    wrong = sum(a == -b for a, b in zip(true, noisy, strict=True))
    assert wrong == round(0.25 * len(true))
    assert sum(a == b for a, b in zip(true, noisy, strict=True)) == len(true) - wrong


def test_wrong_aspects_leave_the_pairs_alone_and_wrong_pairs_carry_their_aspects_over():
    clean, noisy = labelled(noise=0.25), labelled(noise=0.25, aspect_noise=0.25)
    assert [row["chosen"] for row in clean] == [row["chosen"] for row in noisy]
    right = labelled()
    for row, other in zip(clean, right, strict=True):
        sign = -1 if row["flipped"] else 1  # the aspects follow the texts, whose order the flip turned
        assert row["aspects"] == {name: sign * value for name, value in other["aspects"].items()}


def test_the_rows_given_stay_as_they_were_and_a_seed_decides_which_are_wrong():
    before = [dict(row["aspects"]) for row in ROWS]
    first, again, other = (aspects(labelled(aspect_noise=0.25, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [row["aspects"] for row in ROWS] == before


@pytest.mark.parametrize("name", ["noise", "aspect_noise"])
def test_a_share_above_a_half_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=rf"^{name} must be in \[0, 0.5\].*0.6"):
        labelled(**{name: 0.6})


def test_everything_that_faces_a_response_turns_with_it():
    better, worse = World().preference_rows(1, split="test")[0], {}
    row = better | {
        "chosen": better["rejected"], "rejected": better["chosen"], "margin": 2.0, "aspects": {"warm": 1, "sure": 0},
        "aspects_soft": {"warm": 0.75}, "votes": {"chosen": 4, "rejected": 1, "tie": 2},
        "scores": {"chosen": {"warm": 5.0}, "rejected": {"warm": 2.0}},
    }  # fmt: skip
    (worse,) = label_pairs([row], WorldGold(), 0.0, 0)
    assert worse["chosen"] == better["chosen"]
    assert worse["aspects"] == {"warm": -1, "sure": 0}
    assert worse["aspects_soft"] == {"warm": 0.25}
    assert worse["votes"] == {"chosen": 1, "rejected": 4, "tie": 2}
    assert worse["scores"] == {"chosen": {"warm": 2.0}, "rejected": {"warm": 5.0}}
    assert "margin" not in worse
    (same,) = label_pairs([worse | {"margin": 1.0}], WorldGold(), 0.0, 0)
    assert {key: same[key] for key in ("aspects", "votes", "scores")} == {
        key: worse[key] for key in ("aspects", "votes", "scores")
    }


def test_labels_that_are_absent_or_in_part_turn_too():
    (row,) = label_pairs(ROWS[:1], WorldGold(), 0.0, 0)
    labels = {"aspects": {"wit": 1, "art": None}, "aspects_soft": {"wit": 0.75, "art": None}, "votes": {"chosen": 3}}
    other = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    (turned,) = label_pairs([other | labels], WorldGold(), 0.0, 0)
    assert turned["aspects"] == {"wit": -1, "art": None}
    assert turned["aspects_soft"] == {"wit": 0.25, "art": None}
    assert turned["votes"] == {"rejected": 3}
    (bare,) = label_pairs([other | dict.fromkeys(labels)], WorldGold(), 0.0, 0)
    assert {name: bare[name] for name in labels} == dict.fromkeys(labels)


def test_a_wrong_aspect_is_wrong_in_its_soft_label_too():
    rows = [row | {"aspects": {"wit": 1}, "aspects_soft": {"wit": 0.75, "calm": 0.625}} for row in ROWS[:1]]
    right, wrong = (label_pairs(rows * 2, WorldGold(), 0.0, 0, aspect_noise=noise) for noise in (0.0, 0.5))
    flipped = [a["aspects"] != b["aspects"] for a, b in zip(right, wrong, strict=True)]
    assert sum(flipped) == 1
    for a, b, turned in zip(right, wrong, flipped, strict=True):
        expected = 1 - a["aspects_soft"]["wit"] if turned else a["aspects_soft"]["wit"]
        assert b["aspects_soft"] == {"wit": expected, "calm": a["aspects_soft"]["calm"]}
