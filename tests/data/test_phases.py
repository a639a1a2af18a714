"""Which rows a DMoERM's phases see: prompts disjoint, point labels from allowed rows only, orders that never wander."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import WORDS, word_tokenizer

from lit_rlhf.data import CategoryData, PhaseData
from lit_rlhf.types import UserError


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    """A folder with a word tokenizer."""
    folder = tmp_path_factory.mktemp("word")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path):
    """A function that writes rows and returns the path."""

    def _write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return _write


def rows(n=60, pairs=2):
    """Rows of two categories with two and three points; each prompt has several pairs."""
    rng = random.Random(0)
    found = []
    for i in range(n):
        kind = ("ask", "tell")[i % 2]
        prompt = " ".join([{"ask": "who", "tell": "please"}[kind], *rng.sample(WORDS, 3)])
        names = {"ask": ["wit", "calm"], "tell": ["wit", "calm", "art"]}[kind]
        for _ in range(pairs):
            aspects = {name: rng.choice((-1, 0, 1)) for name in names}
            good, bad = (" ".join(rng.sample(WORDS, 3)) for _ in range(2))
            found.append({"prompt": prompt, "chosen": good, "rejected": bad, "category": kind, "aspects": aspects})
    return found


def make(tokenizer, train, **options):
    data = PhaseData(tokenizer, train=train, **{"max_length": 24, "validation_fraction": 0.2} | options)
    data.setup("fit")
    return data


def prompts(data, phase):
    items = data.examples("train").items
    return {items[item.row].row.prompt for item in data.items[phase]}


def asked(data, split="train"):
    """The prompts of the router's phase, or those that it is measured on."""
    return {item.row.group for item in data.router_data.examples(split).items}


def test_the_phases_see_disjoint_prompts_and_none_that_is_held_out(word, write):
    data = make(word, write(rows()))
    held_out = {item.row.prompt for item in data.examples("validation").items}
    task, capability, mixture = (prompts(data, phase) for phase in ("task", "capability", "mixture"))
    assert task
    assert mixture
    assert capability <= task
    assert mixture.isdisjoint(task)
    assert held_out.isdisjoint(task | mixture)
    assert asked(data) == task | mixture
    assert data.router_data.pairs is data  # and no copy, which would copy the trainer and its model too
    assert asked(data, "validation") == held_out
    assert 0.4 < len(task) / len(task | mixture) < 0.8  # 0.6 of some 48 prompts


def test_the_split_follows_its_own_seed_and_the_prompts_text_alone(word, write):
    found = rows()
    first = make(word, write(found))
    shuffled = random.Random(1).sample(found, len(found))
    other = make(word, write(shuffled, "other.jsonl"), seed=7)
    assert prompts(first, "task") == prompts(other, "task")
    assert prompts(first, "mixture") == prompts(other, "mixture")
    assert prompts(make(word, write(found), split_seed=1), "task") != prompts(first, "task")


def test_prompts_of_given_validation_and_test_files_are_never_trained_on(word, write):
    found = rows()
    data = make(word, write(found), validation=write(found[:20], "val.jsonl"), test=write(found[20:40], "test.jsonl"))
    held_out = {row["prompt"] for row in found[:40]}
    assert held_out.isdisjoint(prompts(data, "task") | prompts(data, "capability") | prompts(data, "mixture"))
    questions = {item.row.prompt for item in data.router_data.examples("train").items}
    assert questions == prompts(data, "task") | prompts(data, "mixture")
    assert {item.row.prompt for item in data.router_data.examples("validation").items} <= held_out
    assert data.overlap == 40
    assert "40 training rows left out" in "\n".join(data.report())


def test_a_prompt_as_text_is_held_out_as_messages_too(word, write):
    """The router's own reading of the rows would tell them apart: messages inside the answers leave no prompt."""
    turns = [{"role": "user", "content": "who ran"}]
    answers = {
        name: [*turns, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "the cat"), ("rejected", "no"))
    }
    inside = {"prompt": "who ran", "category": "ask"} | answers
    whole = {"prompt": turns, "chosen": "the cat", "rejected": "no", "category": "ask"}
    path = write([*rows(), inside])
    data = make(word, path, validation=write([whole, *rows(60)[1:2]], "val.jsonl"))
    assert "user: who ran" not in asked(data)
    assert "who ran" not in asked(data)
    assert data.overlap == 1 + 2


def test_the_worlds_router_has_prompts_of_its_own_and_shares_none_with_the_held_out_pairs():
    data = PhaseData(limit=200)
    data.setup("fit")
    held_out = {item.row.prompt for item in data.examples("validation").items}
    assert len(asked(data)) == 200
    assert held_out.isdisjoint(asked(data))


def test_point_labels_come_from_the_aspects_with_their_sign(word, write):
    data = make(word, write(rows()))
    items = data.examples("train").items
    for item in data.items["capability"]:
        row = items[item.row].row
        name = data.points[row.category][item.point]
        assert row.aspects[name] == (-1 if item.first else 1)
        assert item.label == 1.0
    expected = sum(len(items[item.row].row.aspects) for item in data.items["task"])
    assert len(data.items["capability"]) == expected


def test_soft_labels_of_the_points_are_read_where_asked_for(word, write):
    found = [row | {"aspects": {"wit": 1, "calm": -1}, "category": "ask"} for row in rows(pairs=1)]
    soft = {"wit": 0.25, "art": 0.5, "calm": None}
    path = write([row | {"aspects_soft": soft} for row in found] + rows())
    options = {"epochs": {"mixture": 0}, "task_fraction": 1.0, "validation_fraction": 0.0, "categories": ["ask"]}
    data = make(word, path, soft_labels=True, **options)
    assert data.points == {"ask": ("art", "calm", "wit")}
    labels = {(item.point, item.first, item.label) for item in data.items["capability"] if item.row < len(found)}
    assert labels == {(0, 0, 0.5), (1, 1, 1.0), (2, 1, 0.75)}  # `wit`: 0.25 for chosen is 0.75 for rejected
    batch = next(iter(data._loader("capability")))
    items = data.items["capability"]
    assert set(batch.label.tolist()) <= {0.5, 0.75, 1.0}
    assert len({item.label for item in items}) == 3
    hard = make(word, path, **options)
    assert hard.points == {"ask": ("calm", "wit")}
    assert {item.label for item in hard.items["capability"]} == {1.0}


@pytest.mark.parametrize("value", [["wit"], {"wit": 1.5}, {"wit": -0.1}, {"wit": "half"}, {"wit": True}])
def test_soft_labels_that_are_no_probabilities_are_refused(word, write, value):
    path = write([row | {"aspects_soft": value} for row in rows()])
    with pytest.raises(UserError, match=r"rows.jsonl:1: `aspects_soft` is .*probabilities from 0 to 1"):
        make(word, path)


def test_each_prompt_weighs_one_at_each_point(word, write):
    data = make(word, write(rows(pairs=3)))
    items = data.examples("train").items
    for phase in ("task", "capability", "mixture"):
        sums = {}
        for item in data.items[phase]:
            key = (items[item.row].row.prompt, item.point)
            sums[key] = sums.get(key, 0.0) + item.weight
        assert all(value == pytest.approx(1.0) for value in sums.values())


def test_the_order_of_points_is_sorted_or_the_configs_and_never_the_files(word, write):
    found = rows()
    assert make(word, write(found)).points == {"ask": ("calm", "wit"), "tell": ("art", "calm", "wit")}
    assert make(word, write(found[::-1], "other.jsonl")).points == make(word, write(found)).points
    named = {"tell": ["wit", "art"], "ask": ["wit"]}
    data = make(word, write(found), points=named)
    assert list(data.points.items()) == [("tell", ("wit", "art")), ("ask", ("wit",))]
    assert data.categories == ("tell", "ask")


def test_a_batch_says_what_each_pair_trains(word, write):
    data = make(word, write(rows()))
    loader = data._loader("capability")
    items = data.examples("train").items
    swapped = 0
    for batch in loader:
        assert batch.phase == "capability"
        assert batch.divisor.item() == pytest.approx(batch.weight.sum().item())
        for i, number in enumerate(batch.index.tolist()):
            pair = items[number]
            category = data.categories[batch.category[i]]
            assert pair.row.category == category
            labels = [pair.row.aspects.get(name, 0) for name in data.points[category]]
            assert batch.aspects[i, : len(labels)].tolist() == labels
            assert labels[batch.point[i]] != 0
            better = 0 if labels[batch.point[i]] > 0 else 1
            swapped += better
            for side, offset in ((better, 0), (1 - better, len(batch.index))):
                length = int(batch.sequences.attention_mask[offset + i].sum())
                assert tuple(batch.sequences.ids[offset + i, :length].tolist()) == pair.encoded[side].ids
    assert swapped


def test_ranked_rows_become_pairs_with_rank_1_as_chosen(word, write):
    ranked = [
        {"prompt": f"who {a} {b}", "responses": ["the cat", "a dog", "no"], "rank": [2, 3, 1], "category": c}
        for a, b, c in (("cat", "dog", "ask"), ("dog", "cat", "tell"), ("bird", "mat", "ask"), ("mat", "tree", "tell"))
    ]
    options = {"validation_fraction": 0.0, "epochs": {"capability": 0, "mixture": 0}, "task_fraction": 1.0}
    data = make(word, write(ranked), **options)
    pairs = {(item.row.chosen, item.row.rejected) for item in data.examples("train").items}
    assert pairs == {("no", "the cat"), ("no", "a dog"), ("the cat", "a dog")}
    assert {item.weight for item in data.items["task"]} == {1 / 3}


def test_rows_without_a_listed_category_are_dropped_and_counted_or_routed(word, write):
    found = rows()
    found[0]["category"] = None
    found[4]["category"] = "poem"
    path = write(found)
    data = make(word, path, categories=["ask", "tell"], validation_fraction=0.0)
    dropped = data.examples("train").dropped
    assert dropped == {"no category": 1, "a category that is not listed": 1}

    class Routes:
        lightning_module = type("M", (), {"route": staticmethod(lambda prompts: ["tell"] * len(prompts))})
        current_epoch = 0

    routed = PhaseData(word, train=path, categories=["ask", "tell"], max_length=24, validation_fraction=0.0)
    routed.trainer = Routes()
    routed.setup("fit")
    assert routed.routed == 2
    assert routed.examples("train").dropped.total() == 0
    assert [routed.examples("train").items[i].row.category for i in (0, 4, 1)] == ["tell", "tell", "ask"]
    others = write([row | {"prompt": "the " + row["prompt"]} for row in rows()], "others.jsonl")
    held = PhaseData(word, train=others, validation=path, max_length=24)
    held.trainer = Routes()
    assert held.routed == 0
    assert held.examples("validation").dropped["no category"] == 1  # a router must not be graded on its own choices


def test_one_category_for_all_is_a_switch(word, write):
    data = make(word, write(rows()), outer="one")
    assert data.categories == ("all",)
    assert data.points == {"all": ("art", "calm", "wit")}
    assert {item.row.category for item in data.examples("train").items} == {"all"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_fraction": 0.0}, "task_fraction must be"),
        ({"task_fraction": 1.0}, "phase 'mixture' has no rows"),
        ({"epochs": {"mix": 1}}, "epochs.mix is 1"),
        ({"epochs": {"task": -1}}, "epochs.task is -1"),
        ({"points": {"ask": ["wit"]}, "categories": ["ask", "tell"]}, "points name"),
    ],
)
def test_what_cannot_be_is_refused(word, write, options, message):
    with pytest.raises(UserError, match=message):
        _ = make(word, write(rows()), **options).items, make(word, write(rows()), **options).points


def test_phases_without_labels_say_what_they_need(word, write):
    bare = [{key: value for key, value in row.items() if key != "aspects"} for row in rows()]
    with pytest.raises(UserError, match="pairs with `aspects`"):
        _ = make(word, write(bare)).items


def test_the_phases_follow_each_other(word, write):
    data = make(word, write(rows()), epochs={"router": 1, "task": 2, "capability": 0, "mixture": 1})
    assert [data.phase(epoch) for epoch in range(5)] == ["router", "task", "task", "mixture", "mixture"]
    assert [data.first_epoch(phase) for phase in ("router", "task", "mixture")] == [0, 1, 3]


# -- the router's own data --------------------------------------------------------------------------------------------


def test_a_router_reads_every_turn_of_the_user_and_nothing_else(word, write):
    turns = [
        {"role": "system", "content": "rain"},
        {"role": "user", "content": "who ran"},
        {"role": "assistant", "content": "the bird sang"},
        {"role": "user", "content": "why"},
    ]
    found = [{"prompt": turns, "category": "ask"}, {"prompt": "tell me", "category": "tell"}]
    data = CategoryData(word, train=write(found), validation_fraction=0.0, max_length=24)
    data.setup("fit")
    first, second = data.examples("train").items
    tokenizer = data.encoder.tokenizer
    assert tokenizer.decode(first.encoded[0].ids) == "<s> who ran why </s>"
    assert tokenizer.decode(second.encoded[0].ids) == "<s> tell me </s>"


def test_a_long_question_keeps_its_end_and_fits_the_window(word):
    data = CategoryData(word, train="builtin:world", max_length=6)
    (row,) = data.encoder.questions([" ".join(WORDS[:20])])
    assert len(row.ids) == 6
    assert data.encoder.tokenizer.decode(row.ids).split()[1:-1] == WORDS[16:20]


def test_labels_number_the_categories_and_repeated_prompts_count_once(word, write):
    data = CategoryData(word, train=write(rows()), validation_fraction=0.0, max_length=24, batch_size=100)
    data.setup("fit")
    assert data.categories == ("ask", "tell")
    batch = next(iter(data.train_dataloader()))
    items = data.examples("train").items
    assert len(items) == 60
    assert data.examples("train").dropped == {"the prompt occurred before": 60}
    assert [data.categories[i] for i in batch.label] == [items[i].row.category for i in batch.index]
    assert torch.equal(batch.share.examples, torch.tensor(60.0))


def test_a_router_needs_two_categories(word, write):
    one = [row for row in rows() if row["category"] == "ask"]
    with pytest.raises(UserError, match="at least two categories"):
        CategoryData(word, train=write(one), validation_fraction=0.0, max_length=24).setup("fit")
