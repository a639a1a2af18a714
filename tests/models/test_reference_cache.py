"""Kept reference log-probabilities: found again only for the very same question, and never trusted blindly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf.encoding import Encoder
from lit_rlhf.models.reference_cache import ReferenceCache, fingerprint
from lit_rlhf.types import UserError

NAN = float("nan")
CACHE = ReferenceCache(torch.tensor([-1.0, -20.0, -3.0]), torch.tensor([-4.0, -5.0, -60.0]))


def test_what_is_saved_is_loaded(tmp_path):
    assert ReferenceCache.load(tmp_path / "new", "abc") is None
    file = CACHE.save(tmp_path / "new", "abc")
    loaded = ReferenceCache.load(tmp_path / "new", "abc")
    assert torch.equal(loaded.chosen, CACHE.chosen)
    assert torch.equal(loaded.rejected, CACHE.rejected)
    assert loaded.source == str(file)
    assert ReferenceCache.load(tmp_path / "new", "abd") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == [file.name]


def test_rows_are_looked_up_by_number_in_any_order():
    chosen, rejected = CACHE.rows(torch.tensor([2, 0, 2]))
    assert chosen.tolist() == [-3.0, -1.0, -3.0]
    assert rejected.tolist() == [-60.0, -4.0, -60.0]


@pytest.mark.parametrize("row", [3, -1, 1])
def test_a_row_that_was_not_computed_is_refused(row):
    cache = ReferenceCache(torch.tensor([-1.0, NAN, -3.0]), torch.tensor([-4.0, NAN, -60.0]))
    with pytest.raises(UserError, match=f"no row {row};"):
        cache.rows(torch.tensor([0, row]))


def test_equal_live_values_pass():
    CACHE.verify(torch.tensor([2, 1]), torch.tensor([-3.0, -20.01]), torch.tensor([-60.0, -5.0]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([-3.0, -20.1], [-60.0, -5.0], "row 1, chosen: -20.0000 nats .* -20.1000"),
        ([-3.0, -20.0], [-61.0, -5.01], "row 2, rejected"),
        ([-20.0, -3.0], [-5.0, -60.0], "row"),  # the right values of the wrong rows
        ([-3.0, NAN], [-60.0, -5.0], "row 1, chosen"),
    ],
)
def test_other_live_values_are_refused_by_row(chosen, rejected, message):
    with pytest.raises(UserError, match=message):
        CACHE.verify(torch.tensor([2, 1]), torch.tensor(chosen), torch.tensor(rejected))


def test_a_damaged_file_is_named(tmp_path):
    file = CACHE.save(tmp_path, "abc")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{file.name} is damaged"):
        ReferenceCache.load(tmp_path, "abc")


def changed(path: str, folder: Path, what: str) -> str:
    """Copy a model folder with one thing changed."""
    folder = Path(shutil.copytree(path, folder))
    if what == "weights":
        state = load_file(folder / "model.safetensors")
        next(iter(state.values())).view(-1)[0] += 1e-3
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif what == "config":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    elif what == "notes":
        (folder / "README.md").write_text("hello")
    return str(folder)


def test_a_fingerprint_is_that_of_contents_and_not_of_places(tiny_llama_path, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_path)
    one = fingerprint(tiny_llama_path, encoder, "data", dtype="float32")
    copy = changed(tiny_llama_path, tmp_path / "copy", "notes")
    encoder.tokenizer(["the cat", "the"], padding=True, truncation=True, max_length=2)  # leaves a trace in it
    assert fingerprint(copy, encoder, "data", dtype="float32") == one
    assert fingerprint(copy, Encoder.from_pretrained(copy), "data", dtype="float32") == one


@pytest.mark.parametrize("what", ["weights", "config"])
def test_another_model_has_another_fingerprint(tiny_llama_path, tmp_path, what):
    encoder = Encoder.from_pretrained(tiny_llama_path)
    other = changed(tiny_llama_path, tmp_path / "other", what)
    assert fingerprint(other, encoder, "data") != fingerprint(tiny_llama_path, encoder, "data")


def with_template(encoder: Encoder) -> Encoder:
    encoder.tokenizer.chat_template = "{{ messages }}"
    return encoder


def with_token(encoder: Encoder) -> Encoder:
    encoder.tokenizer.add_tokens(["wolf"])
    return encoder


def test_everything_else_counts_too(tiny_llama_path, tiny_gpt2_path):
    def load(path=tiny_llama_path, **options) -> Encoder:
        return Encoder.from_pretrained(path, **options)

    prints = [
        fingerprint(tiny_llama_path, encoder, data, **settings)
        for encoder, data, settings in [
            (load(), "data", {}),
            (load(), "other data", {}),
            (load(), "data", {"dtype": "bfloat16"}),
            (load(joiner="\n"), "data", {}),
            (load(max_length=32), "data", {}),
            (load(tiny_gpt2_path), "data", {}),
            (with_template(load()), "data", {}),
            (with_token(load()), "data", {}),
        ]
    ]
    assert len(set(prints)) == len(prints)


def test_an_adapters_base_counts(tiny_llama_path, tmp_path):
    from transformers import AutoTokenizer

    from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions

    base = changed(tiny_llama_path, tmp_path / "base", "notes")
    Backbone(base, ModelOptions(lora=LoRA(r=2))).export(tmp_path / "adapter", AutoTokenizer.from_pretrained(base))
    encoder = Encoder.from_pretrained(tiny_llama_path)
    before = fingerprint(str(tmp_path / "adapter"), encoder, "data")
    assert fingerprint(str(tmp_path / "adapter"), encoder, "data") == before
    text = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(text + "\n")
    assert fingerprint(str(tmp_path / "adapter"), encoder, "data") != before


def test_a_model_that_is_not_here_has_no_fingerprint(tiny_llama_path):
    with pytest.raises(UserError, match="nobody/nothing"):
        fingerprint("nobody/nothing", Encoder.from_pretrained(tiny_llama_path), "data")
