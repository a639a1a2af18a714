"""Scorers against reference responses: each response by itself, by a kept library or a classifier."""

import json

import pytest
import torch

from lit_rlhf.models.text_metrics import IntentMatch, TextOverlap
from lit_rlhf.specs import build, plain
from lit_rlhf.types import Scorer, UserError
from tests.conftest import SENTENCES, WORDS, word_tokenizer

MESSAGES = [{"role": "user", "content": "who sang"}]
ROWS = [
    {"prompt": "where", "response": "the cat sat on the mat"},
    {"prompt": "what", "response": "a bird sang"},
    {"prompt": "what", "response": "the dog slept"},
    {"prompt": MESSAGES, "response": "i think it is good", "category": "chat"},
]
PROMPTS = ["where", "what", MESSAGES, "where"]
RESPONSES = ["the cat sat", "a bird sang", "we think it is bad", ""]


@pytest.fixture
def references(tmp_path):
    path = tmp_path / "references.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """A BERT of three labels with random weights large enough to tell sentences apart."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def f1(precision, recall):
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("rouge1", [f1(1, 3 / 6), 1, f1(3 / 5, 3 / 5), 0]),  # "think it is" of five words each
        ("rouge2", [f1(1, 2 / 5), 1, f1(2 / 4, 2 / 4), 0]),
        ("rougeL", [f1(1, 3 / 6), 1, f1(3 / 5, 3 / 5), 0]),
        ("bleu1", [torch.tensor(1 - 6 / 3).exp().item(), 1, 3 / 5, 0]),  # brevity penalty exp(1 - 6 / 3)
        # smoothed: (matches + 1) / (n-grams + 1) above single words
        ("bleu2", [torch.tensor(1 - 6 / 3).exp().item(), 1, (3 / 5 * 3 / 5) ** 0.5, 0]),
    ],
)
def test_overlaps_are_the_known_ones(references, metric, wanted):
    assert TextOverlap(references, metric).score(PROMPTS, RESPONSES).total.tolist() == pytest.approx(wanted, abs=1e-6)


def test_chrf_matches_characters_and_words(references):
    scores = TextOverlap(references).score(["where", "where", "where"], ["the cat sat on the mat", "the cats", "zzz"])
    assert scores.total[0] == 1
    assert 0.1 < scores.total[1] < 0.5
    assert scores.total[2] == 0


def test_the_best_of_several_references_counts(references):
    for metric in ("chrf", "rouge1", "rougeL", "bleu1"):
        scorer = TextOverlap(references, metric)
        assert scorer.score(["what"] * 2, ["a bird sang", "the dog slept"]).total.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("kind", ["chrf", "rougeL", "bleu2", "intent"])
def test_a_score_is_that_response_alone_whatever_came_before_or_beside(references, classifier, kind):
    """The released code gives each response the mean over all that were finished so far."""

    def fresh():
        return IntentMatch(classifier, references) if kind == "intent" else TextOverlap(references, kind)

    scorer = fresh()
    together = scorer.score(PROMPTS, RESPONSES).total
    alone = [fresh().score([p], [r]).total[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert together.tolist() == [float(score) for score in alone]
    for _ in range(3):
        scorer.score(["where"] * 5, [ROWS[0]["response"]] * 5)
    assert torch.equal(scorer.score(PROMPTS[::-1], RESPONSES[::-1]).total.flip(0), together)
    assert together.dtype == torch.float32
    assert together.unique().numel() > 1


def test_intent_is_the_classifiers_label_of_both(references, classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(classifier).eval(),
        AutoTokenizer.from_pretrained(classifier),
    )

    def label(text):
        return model(**tokenizer(text, return_tensors="pt")).logits.argmax().item()

    texts = [*SENTENCES, *WORDS[:12], *(row["response"] for row in ROWS)]
    scorer = IntentMatch(classifier, references, batch_size=3)
    assert scorer.labels(texts) == [label(text) for text in texts]
    assert len(set(scorer.labels(texts))) > 1
    matched = scorer.score(["where"] * len(texts), texts).total
    assert matched.tolist() == [float(label(text) == label(ROWS[0]["response"])) for text in texts]
    either = {label(ROWS[1]["response"]), label(ROWS[2]["response"])}
    found = scorer.score(["what"] * len(texts), texts).total
    assert found.tolist() == [float(label(text) in either) for text in texts]


def test_long_responses_are_cut_to_the_window(references, classifier):
    long = " ".join(["the cat sang"] * 60)
    scorer = IntentMatch(classifier, references)
    assert scorer.labels([long]) == scorer.labels([" ".join(long.split()[:63])])  # and the start token


@pytest.mark.parametrize("kind", ["overlap", "intent"])
def test_an_unknown_prompt_is_named(references, classifier, kind):
    scorer = TextOverlap(references) if kind == "overlap" else IntentMatch(classifier, references)
    with pytest.raises(UserError, match=r"references.jsonl has no reference response to the prompt 'nowhere'"):
        scorer.score(["where", "nowhere"], ["a", "b"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "broken JSON"),
        ('["where", "there"]', "expected `prompt`"),
        ('{"prompt": "where"}', "expected `prompt` and a non-empty string `response`"),
        ('{"prompt": "where", "response": " "}', "non-empty"),
        ('{"prompt": 3, "response": "a"}', "expected `prompt`"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=rf"bad.jsonl:3: .*{message}"):
        TextOverlap(str(path))


def test_what_cannot_work_is_refused(tmp_path, references, classifier, tiny_llama_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl: no such file"):
        TextOverlap(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        TextOverlap(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"metric must be one of chrf, .*got 'meteor'"):
        TextOverlap(references, "meteor")
    with pytest.raises(UserError, match="batch_size must be >= 1, got 0"):
        IntentMatch(classifier, references, batch_size=0)
    with pytest.raises(UserError, match="weights are missing"):  # a language model has no labels to give
        IntentMatch(tiny_llama_path, references).labels(["a"])
    with pytest.raises(UserError, match="two labels or more was expected, got 1"):
        IntentMatch("builtin:proxy-0", references).labels(["a"])


def test_a_classifier_without_padding_is_refused(references, classifier, tmp_path):
    import shutil

    shutil.copytree(classifier, folder := tmp_path / "bare")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no padding token"):
        IntentMatch(str(folder), references).labels(["a"])


def test_both_are_described_by_plain_arguments_and_built_again(references, classifier):
    for scorer in (TextOverlap(references, "rouge2"), IntentMatch(classifier, references, 2, max_length=9)):
        again = build(plain(scorer), Scorer)
        assert plain(again) == plain(scorer)
        assert torch.equal(again.score(PROMPTS, RESPONSES).total, scorer.score(PROMPTS, RESPONSES).total)
