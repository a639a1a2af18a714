"""Ids and masks: every way in which text has been known to lose its ends, its start or its place."""

import json

import pytest
import torch
from conftest import byte_tokenizer, word_tokenizer

from lit_rlhf.assets import resolve
from lit_rlhf.encoding import Encoder
from lit_rlhf.types import UserError

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
START, END, PAD = "<s>", "</s>", "<pad>"
QUESTION = [{"role": "user", "content": "who ran?"}]
PROMPTS = ["the cat", "the cat and", "", QUESTION]


def chat_tokenizer():
    """Byte-level BPE with a start and an end token of its own and a chat template that writes both."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def words(text):
    return tuple(word_tokenizer().convert_tokens_to_ids(text.split()))


def test_ids_by_hand():
    row = Encoder(word_tokenizer()).encode("the cat", "sat on the mat")
    assert row.ids == words("<s> the cat sat on the mat </s>")
    assert (row.prompt_length, row.response_length, row.truncated) == (3, 5, False)


# -- the boundary between prompt and response ------------------------------------------------------------------------


@pytest.mark.parametrize("joiner", ["", " ", "  ", "\n", "\n\n", "\nAnswer: ", " -> "])
def test_parts_concatenate_and_no_text_is_lost(joiner):
    encoder = Encoder(byte_tokenizer(), joiner=joiner)
    row = encoder.encode("the cat", "sat on")
    assert encoder.tokenizer.decode(row.ids) == f"the cat{joiner}sat on<|endoftext|>"
    assert encoder.response_text(row.ids[row.prompt_length :]) == "sat on"


def test_space_goes_with_the_word_after_it():
    encoder = Encoder(byte_tokenizer())
    row = encoder.encode("the", "cat")
    whole = encoder.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert list(row.ids[:-1]) == whole
    assert encoder.tokenizer.decode(row.ids[: row.prompt_length]) == "the"


@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer, chat_tokenizer])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_ids_are_the_same_in_training_and_sampling(make, prompt):
    encoder = Encoder(make())
    sampled = encoder.collate_prompts(["the bird sang under the tree then slept", prompt])
    ids = tuple(sampled.ids[1][sampled.attention_mask[1]].tolist())
    for response in ("sat", "cat dog mat"):
        row = encoder.encode(prompt, response)
        assert row.ids[: row.prompt_length] == encoder.prompt(prompt) == ids


@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer, chat_tokenizer])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_encoding_a_decoded_response_gives_its_ids_back(make, prompt):
    encoder = Encoder(make())
    row = encoder.encode(prompt, "the dog sat")
    text = encoder.response_text(row.ids[row.prompt_length :])
    assert text == "the dog sat"
    assert encoder.encode(prompt, text) == row


def test_many_rows_are_encoded_as_one_by_one():
    encoder = Encoder(byte_tokenizer())
    responses = ["sat", "ran", "", "sat on"]
    assert encoder.encode_many(PROMPTS, responses) == [
        encoder.encode(p, r) for p, r in zip(PROMPTS, responses, strict=True)
    ]
    assert encoder.encode_many([], []) == []


# -- start and end tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["the cat", "<s> the cat", ""])
def test_start_token_stands_once(prompt):
    ids = Encoder(word_tokenizer()).encode(prompt, "sat").ids
    assert ids[0] == words(START)[0]
    assert ids.count(ids[0]) == 1


def test_template_decides_about_the_start_token():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert Encoder(tokenizer).prompt(QUESTION).count(*words(START)) == 1
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    assert Encoder(tokenizer).prompt(QUESTION).count(*words(START)) == 0


def test_no_start_token_where_the_tokenizer_adds_none():
    ids = Encoder(chat_tokenizer()).encode("the cat", "sat").ids
    assert chat_tokenizer().bos_token_id not in ids


@pytest.mark.parametrize(
    ("make", "start"), [(word_tokenizer, "<s>"), (byte_tokenizer, "<|endoftext|>"), (chat_tokenizer, "<s>")]
)
def test_a_text_without_prompt_follows_a_start(make, start):
    encoder = Encoder(make(), joiner="\n")
    row = encoder.encode("", "the cat")
    assert (row.prompt_length, row.ids[0]) == (1, encoder.tokenizer.convert_tokens_to_ids(start))
    assert encoder.response_text(row.ids[1:]) == "the cat"


@pytest.mark.parametrize("response", ["sat", "sat</s>", "sat </s>"])
def test_end_token_stands_once(response):
    ids = Encoder(word_tokenizer()).encode("the cat", response).ids
    assert ids[-2:] == words("sat </s>")
    assert ids.count(*words(END)) == 1


def test_nothing_counts_after_a_stop_token():
    row = Encoder(word_tokenizer()).encode("the cat", "sat </s> dog ran")
    assert row.ids == words("<s> the cat sat </s>")
    assert row.truncated


def test_further_stop_tokens_end_a_response():
    encoder = Encoder(word_tokenizer(), stop_ids=words("mat"))
    assert set(encoder.stop_ids) == {*words(END), *words("mat")}
    assert encoder.encode("the cat", "on the mat").ids[-1:] == words("mat")
    assert encoder.response_text(words("on the mat dog")) == "on the"


def test_stop_tokens_come_from_both_configs_of_a_model(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": words("mat")[0]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*words("dog"), *words("cat")]}))
    stop_ids = Encoder.from_pretrained(str(tmp_path)).stop_ids
    assert set(stop_ids) == {*words(END), *words("mat"), *words("dog"), *words("cat")}


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        Encoder(tokenizer)


# -- chat templates --------------------------------------------------------------------------------------------------


def test_chat_response_is_what_the_template_adds():
    encoder = Encoder(chat_tokenizer())
    row = encoder.encode(QUESTION, "the dog")
    decode = encoder.tokenizer.decode
    assert decode(row.ids[: row.prompt_length]) == "<s><user>who ran?</s>\n<assistant>"
    assert decode(row.ids[row.prompt_length :]) == "the dog</s>"  # the template's newline comes after the end
    assert not row.truncated


def test_messages_without_template_are_plain_lines():
    encoder = Encoder(byte_tokenizer())
    turns = [*QUESTION, {"role": "assistant", "content": "you"}, {"role": "user", "content": "why?"}]
    row = encoder.encode(turns, "rain")
    text = "user: who ran?\nassistant: you\nuser: why?\nassistant: rain<|endoftext|>"
    assert encoder.tokenizer.decode(row.ids) == text
    assert not encoder.has_chat_template
    assert Encoder(chat_tokenizer()).has_chat_template


# -- the window ------------------------------------------------------------------------------------------------------


def test_a_cut_response_loses_its_end_token_and_says_so():
    encoder = Encoder(word_tokenizer(), max_length=6)
    assert not encoder.encode("the cat", "sat on").truncated
    assert encoder.encode("the cat", "sat on").ids[-1:] == words(END)
    for response, kept in (("sat on the", "sat on the"), ("sat on the mat", "sat on the")):
        row = encoder.encode("the cat", response)
        assert row.truncated
        assert row.ids == words(f"<s> the cat {kept}")


def test_a_prompt_that_fills_the_window_has_no_encoding():
    encoder = Encoder(word_tokenizer(), max_length=4)
    assert encoder.encode("the cat sat", "on") is None
    row = encoder.encode("the cat", "sat on")
    assert (row.ids, row.prompt_length) == (words("<s> the cat sat"), 3)


def test_keeping_the_end_of_a_prompt_depends_on_the_prompt_alone():
    encoder = Encoder(word_tokenizer(), max_length=4, keep_end=True)
    assert encoder.prompt("the cat") == words("<s> the cat")
    assert encoder.prompt("the cat sat on the mat") == words("<s> the mat")
    assert encoder.encode("the cat sat on the mat", "dog").ids == words("<s> the mat dog")


def test_rows_are_cut_before_they_are_padded():
    encoder = Encoder(word_tokenizer(), max_length=5)
    batch = encoder.collate([encoder.encode("the cat", "sat"), encoder.encode("the cat", "sat on the mat")])
    assert batch.ids.tolist() == [list(words("<s> the cat sat </s>")), list(words("<s> the cat sat on"))]


# -- masks -----------------------------------------------------------------------------------------------------------


def test_masks_come_from_lengths_where_padding_is_the_end_token():
    encoder = Encoder(byte_tokenizer())
    assert encoder.pad_id == encoder.eos_id
    rows = [encoder.encode("the cat", "sat"), encoder.encode("the", "dog sat on the mat under the tree")]
    batch = encoder.collate(rows)
    for i, row in enumerate(rows):
        assert batch.ids[i][batch.attention_mask[i]].tolist() == list(row.ids)
        assert batch.ids[i][batch.response_mask[i]].tolist() == list(row.ids[row.prompt_length :])
        assert batch.ids[i][batch.response_mask[i]][-1] == encoder.eos_id
    assert batch.response_lengths.tolist() == [row.response_length for row in rows]


def test_padding_tokens_inside_a_response_count():
    encoder = Encoder(word_tokenizer())
    batch = encoder.collate([encoder.encode("the cat", "sat <pad> on"), encoder.encode("the", "dog")])
    assert batch.response_mask[0].tolist() == [False] * 3 + [True] * 4
    assert batch.ids[0, 4] == encoder.pad_id


def test_prompts_are_padded_on_the_left():
    batch = Encoder(word_tokenizer()).collate_prompts(["the cat sat on", "dog"])
    assert batch.ids[1].tolist() == [*words(PAD) * 3, *words("<s> dog")]
    assert batch.attention_mask[1].tolist() == [False] * 3 + [True] * 2
    assert not batch.response_mask.any()
    assert batch.position_ids[1].tolist() == [0, 0, 0, 0, 1]


def test_positions_do_not_depend_on_the_side_of_the_padding():
    encoder = Encoder(word_tokenizer())
    left = encoder.collate_prompts(["dog ran", "the cat sat on the mat"])
    right = encoder.collate([encoder.encode("dog", "ran"), encoder.encode("the cat", "sat on the mat")])
    assert left.position_ids[0][left.attention_mask[0]].tolist() == [0, 1, 2]
    assert right.position_ids[0][right.attention_mask[0]].tolist() == [0, 1, 2, 3]
    assert right.ids.dtype == torch.int64


# -- loading ---------------------------------------------------------------------------------------------------------


def test_window_comes_from_the_model(tiny_llama_path, tiny_gpt2_path):
    assert Encoder.from_pretrained(tiny_llama_path).max_length == 64
    assert Encoder.from_pretrained(tiny_gpt2_path, max_length=32).max_length == 32
    with pytest.raises(UserError, match=r"max_length 65 is larger than .*64"):
        Encoder.from_pretrained(tiny_llama_path, max_length=65)


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "no/such-model"])
def test_what_cannot_be_loaded_is_named(name):
    with pytest.raises(UserError, match=name):
        Encoder.from_pretrained(name)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=str(tmp_path)):
        Encoder.from_pretrained(str(tmp_path))


def test_built_in_names():
    assert resolve("org/model") == "org/model"
    with pytest.raises(UserError, match=r"builtin:nobody.*builtin:policy, builtin:proxy-0"):
        resolve("builtin:nobody")
