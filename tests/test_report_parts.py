"""What tables on a terminal and the templates share."""

import pytest

from lit_rlhf.report_parts import environment, padded, printable


def test_a_table_is_padded_by_column():
    lines = [("name", "n", "gold"), ("a", "10", "+0.50"), ("longer", "2", "-")]
    assert padded(lines).split("\n") == [
        "name     n   gold",
        "-----------------",
        "a       10  +0.50",
        "longer   2      -",
    ]
    assert padded(lines, left=0, ruled=False).split("\n")[1] == "     a  10  +0.50"
    assert padded(lines, left=3).split("\n")[3] == "longer  2   -"  # nothing trails


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        padded([("a", "b"), ("c",)])


def test_text_cannot_move_the_cursor():
    assert printable("a\x1b[2J\r\nb\u202e\u2028é√ ±") == "a [2J  b  é√ ±"
    assert padded([("name",), ("a\tb\n",)]).split("\n")[2] == "a b"


def test_templates_escape_and_refuse_what_is_missing():
    from jinja2 import UndefinedError

    template = environment().from_string("{{ text }}")
    assert template.render(text="<b>") == "&lt;b&gt;"
    with pytest.raises(UndefinedError, match="text"):
        template.render()
