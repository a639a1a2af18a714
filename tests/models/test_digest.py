"""A model's name by its contents: what it stands on counts too."""

import json

import pytest

from lit_rlhf.models.digest import model_digest


@pytest.mark.parametrize(("more", "counts"), [({}, True), ({"body": "shared"}, True), ({"body": "backbones"}, False)])
def test_the_base_of_a_model_of_several_parts_counts(tmp_path, more, counts):
    parts, base = tmp_path / "parts", tmp_path / "base"
    for folder in (parts, base):
        folder.mkdir()
    (parts / "reward.json").write_text(json.dumps({"form": "x", "base": str(base)} | more))
    (base / "config.json").write_text("{}")
    before = model_digest(str(parts))
    assert model_digest(str(parts)) == before
    (base / "config.json").write_text('{"a": 1}')
    assert (model_digest(str(parts)) != before) == counts


def test_a_base_inside_the_folder_is_hashed_with_it(tmp_path):
    (tmp_path / "member-0").mkdir()
    (tmp_path / "reward.json").write_text(json.dumps({"form": "x", "base": "member-0", "members": ["member-0"]}))
    before = model_digest(str(tmp_path))
    (tmp_path / "member-0" / "config.json").write_text("{}")
    assert model_digest(str(tmp_path)) != before
