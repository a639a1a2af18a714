"""The built-in world: the same seed gives the same rows, and gold is what its docstring says."""

import math

import pytest

from lit_rlhf.data.synthetic import ASPECTS, CATEGORIES, World, WorldGold, build_tokenizer, gold_reward
from lit_rlhf.data.world_gold import PEAKS, WEIGHTS, amounts, aspect_values, hump
from lit_rlhf.data.world_language import NOUNS, category_of, points_of, well_formed, words_of

CHAT = "hey, i saw the rose, the bee and the soil today!"
FACTS = "what are the rose, the bee and the soil?"


@pytest.mark.parametrize("method", ["prompts", "sft_rows", "preference_rows", "ranked_rows"])
def test_rows_follow_from_the_seed(method):
    first, again, other = (getattr(World(seed), method)(20) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_row_does_not_depend_on_how_many_are_drawn():
    assert World().sft_rows(5) == World().sft_rows(9)[:5]
    assert World().prompts(5) == World().prompts(9)[:5]
    assert World().preference_rows(5, noise=0) == World().preference_rows(9, noise=0)[:5]


def test_splits_share_no_prompt():
    world = World(1)
    seen = {
        split: {row["prompt"] for seed in (1, 2) for row in World(seed).preference_rows(300, split=split)}
        | {row["prompt"] for row in world.prompts(300, split)}
        for split in ("train", "validation", "test")
    }
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_prompts_differ_cover_the_categories_and_run_out_with_a_message():
    rows = World().prompts(500)
    assert len({row["prompt"] for row in rows}) == 500
    assert {row["category"] for row in rows} == set(CATEGORIES)
    assert all(category_of(row["prompt"]) == row["category"] for row in rows)
    assert all(len(points_of(row["prompt"])) == 3 for row in rows)
    with pytest.raises(ValueError, match="at most 4000 in split 'test', got 4001"):
        World().prompts(4001, "test")


@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_the_stated_share_of_labels_is_flipped_and_marked(noise):
    rows = World(2).preference_rows(200, noise=noise)
    wrong = [gold_reward(row["prompt"], row["chosen"]) < gold_reward(row["prompt"], row["rejected"]) for row in rows]
    assert sum(wrong) == 200 * noise
    assert wrong == [row["flipped"] for row in rows]


def test_noise_is_a_quarter_in_train_and_none_elsewhere_and_checked():
    assert sum(row["flipped"] for row in World().preference_rows(100)) == 25
    assert not any(row["flipped"] for row in World().preference_rows(100, split="validation"))
    with pytest.raises(ValueError, match=r"noise must be in \[0, 1\], got 1.5"):
        World().preference_rows(1, noise=1.5)


def test_noise_changes_labels_and_nothing_else():
    clean, noisy = (World().preference_rows(50, noise=noise) for noise in (0.0, 0.5))
    for row, other in zip(clean, noisy, strict=True):
        kept = (row["chosen"], row["rejected"])
        assert (other["chosen"], other["rejected"]) == (kept[::-1] if other["flipped"] else kept)


def test_aspect_labels_compare_the_responses_as_they_stand():
    for row in World().preference_rows(50):
        chosen, rejected = (aspect_values(row["prompt"], row[key]) for key in ("chosen", "rejected"))
        for name in ASPECTS:
            gap = chosen[name] - rejected[name]
            assert row["aspects"][name] == (0 if abs(gap) < 0.1 else math.copysign(1, gap))


def test_ranks_follow_gold():
    for row in World().ranked_rows(20, m=4):
        golds = [gold_reward(row["prompt"], response) for response in row["responses"]]
        assert sorted(row["rank"]) == [1, 2, 3, 4]
        assert sorted(range(4), key=lambda i: row["rank"][i]) == sorted(range(4), key=lambda i: -golds[i])


def test_hump_by_hand():
    assert [hump(x, 4.0) for x in (0, 2, 4, 5, 6, 8, 40)] == [0.0, 0.75, 1.0, 0.875, 0.5, -1.0, -2.0]
    assert [hump(x, 4.0) for x in (-1, -40)] == [-0.25, -2.0]
    assert [hump(x, -2.0) for x in (-1, -2, -3, 1)] == [0.75, 1.0, 0.5, -0.5]


def test_amounts_by_hand():
    text = "surely, the quiet rose is quiet. thanks, dear friend. maybe, maybe, the whale needs the rose. the the"
    # 18 words: rose twice on the topic, whale off it; one point of three named, once again; sentences of 6 + 3 + 7
    # words are whole, the last of 2 is broken
    assert amounts(FACTS, text) == {
        "relevance": pytest.approx(1 / 18),
        "completeness": pytest.approx(0.5 / 3),
        "certainty": -1.0,
        "warmth": 3.0,
        "variety": 0.0,
        "length_fit": 18.0,
        "flow": (6 + 3 + 7 - 2) / 4,
    }


def test_gold_by_hand():
    text = "surely, the rose needs the bee."
    u = [2 / 3, 1 / 3, 0, 0, 6 / 27, 6 / 7]  # two of three points, one certain word, six words
    values = [1 - 2 * (2 / 6 / 0.28 - 1) ** 2, *(2 * x - x * x for x in u)]  # relevance is past its peak
    expected = sum(weight * value for weight, value in zip(WEIGHTS["objective_qa"], values, strict=True))
    assert gold_reward(FACTS, text) == pytest.approx(expected)


OVERDONE = {
    "relevance": ("surely, surely, the bold, pale rose needs the soft bee.", "rose bee rose bee rose bee rose bee."),
    "completeness": ("the rose needs the bee. the soil is soft.", "the rose needs the rose. " * 6),
    "certainty": ("surely, the rose is soft.", "surely, clearly, certainly, " * 4 + "the rose is soft."),
    "warmth": ("thanks.", "thanks, dear friend. " * 6),
    "variety": ("the quiet, pale rose is soft.", "the quiet, quiet, quiet, quiet rose is soft. " * 2),
    "length_fit": ("the rose needs the bee. " * 5, "the rose needs the bee. " * 30),
    "flow": ("the quiet rose needs the pale bee.", "the rose needs the bee" + " and the rose needs the bee" * 6 + "."),
}
TENTATIVE = ("maybe, the rose is soft.", "maybe, perhaps, possibly, " * 4 + "the rose is soft.")


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_every_aspect_turns_down_when_overdone(aspect, category):
    prompt = {row["category"]: row["prompt"] for row in World().prompts(50)}[category]
    texts = TENTATIVE if (aspect, category) == ("certainty", "chit_chat") else OVERDONE[aspect]
    mine = {"rose": 0, "bee": 1, "soil": 2}
    points = points_of(prompt)
    good, much = (
        " ".join(points[mine[w]] if w in mine else w for w in text.replace(".", " .").replace(",", " ,").split())
        for text in texts
    )
    assert aspect_values(prompt, much)[aspect] < aspect_values(prompt, good)[aspect]
    assert aspect_values(prompt, good)[aspect] > aspect_values(prompt, "")[aspect]


def test_many_different_describing_words_are_too_many():
    rich = "the quiet, pale, soft rose is green and deep and tall and bold and rough and crisp and swift and hollow."
    assert aspect_values(FACTS, rich)["variety"] < 0 < aspect_values(FACTS, "the quiet, pale rose is soft.")["variety"]


def test_categories_disagree_about_one_and_the_same_response():
    text = "thanks, dear friend. i am so happy and glad!"
    assert aspect_values(CHAT, text)["warmth"] > 0.8
    assert aspect_values(FACTS, text)["warmth"] == -2
    assert set(WEIGHTS) == set(PEAKS) == set(CATEGORIES)


@pytest.mark.parametrize(
    "text", ["", "   ", "?!", "zxq 7 \U0001f600 ünïcode", "the " * 500, "<eos><pad>", "\n\t.", "_"]
)
@pytest.mark.parametrize("prompt", [FACTS, "", "unknown words only"])
def test_any_text_has_a_gold_reward(prompt, text):
    values = aspect_values(prompt, text)
    assert all(-2 <= value <= 1 for value in values.values())
    assert math.isfinite(gold_reward(prompt, text))


def test_the_scorer_agrees_with_the_function_and_reads_message_lists():
    rows = World().sft_rows(20)
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    scores = WorldGold().score(prompts, responses)
    assert scores.total.tolist() == pytest.approx([gold_reward(*pair) for pair in zip(prompts, responses, strict=True)])
    assert tuple(scores.parts) == ASPECTS
    messages = [[{"role": "system", "content": "x"}, {"role": "user", "content": prompt}] for prompt in prompts]
    assert WorldGold().score(messages, responses).total.equal(scores.total)


def test_case_and_spacing_do_not_matter():
    assert gold_reward(FACTS, "Surely ,the rose  is soft .") == gold_reward(FACTS.upper(), "surely, the rose is soft.")


def test_the_tokenizer_gives_back_every_text():
    tokenizer = build_tokenizer()
    texts = [text for row in World().preference_rows(300) for text in (row["prompt"], row["chosen"], row["rejected"])]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(words_of(text))
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.decode(tokenizer(CHAT + "<eos>")["input_ids"], skip_special_tokens=True) == CHAT


def test_the_grammar_makes_well_formed_sentences_of_a_readable_length():
    lengths = []
    for row in World().sft_rows(300):
        text = row["response"].replace("!", ".")
        assert text.endswith(".")
        assert all(well_formed(words_of(part)) for part in text[:-1].split(". "))
        lengths.append(len(text.split()))
    assert 15 < sum(lengths) / 300 < 25
    assert sorted(lengths)[285] <= 42
    assert not well_formed(words_of("the rose the bee"))
    assert len(NOUNS) == 90


def test_a_row_reads_as_it_should():
    row = World(0).preference_rows(1)[0]
    assert set(row) == {"prompt", "chosen", "rejected", "category", "aspects", "flipped", "gold"}
