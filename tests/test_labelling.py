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
