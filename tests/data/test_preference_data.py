"""Rows of text become batches whose every number can be traced back to the row it came from."""

import json
import pickle

import pytest
import torch
from conftest import byte_tokenizer, word_tokenizer
from lightning.pytorch import LightningModule, Trainer

from lit_rlhf.data import PreferenceData, PromptData, SFTData
from lit_rlhf.data.examples import held_out_groups
from lit_rlhf.types import PreferenceBatch, UserError

NOUNS = ["cat", "dog", "bird", "tree", "mat", "rain"]


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


def rows(n=40, **extra):
    """Pairs; each prompt occurs twice."""
    texts = [f"{NOUNS[i // 2 % 6]} {NOUNS[i // 12 % 6]} ran" for i in range(n)]
    return [
        {"prompt": text, "chosen": f"the {NOUNS[i % 5]} sat", "rejected": "no", **extra} for i, text in enumerate(texts)
    ]


def make(kind, tokenizer, train, **options):
    data = kind(tokenizer, train=train, **{"max_length": 16, "validation_fraction": 0.0} | options)
    data.setup("fit")
    return data


def decoded(data, ids):
    return data.encoder.tokenizer.decode(ids)


def prompts_of(data, split):
    return {item.row.prompt for item in data.examples(split).items}


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_by_hand(word, write):
    votes = [{"chosen": 3, "rejected": 1}, {"chosen": 1, "rejected": 1, "tie": 2}]
    path = write(
        [
            {"prompt": "the cat", "chosen": "sat on", "rejected": "ran", "margin": 0.5, "votes": votes[0]},
            {"prompt": "dog", "chosen": "ran", "rejected": "sat on the mat", "category": "qa", "votes": votes[1]},
        ]
    )
    data = make(PreferenceData, word, path, soft_labels=True, batch_size=2)
    (batch,) = data.loader("train")
    assert isinstance(batch, PreferenceBatch)
    assert [decoded(data, ids) for ids in batch.sequences.ids] == [
        "<s> the cat sat on </s> <pad>",
        "<s> dog ran </s> <pad> <pad> <pad>",
        "<s> the cat ran </s> <pad> <pad>",
        "<s> dog sat on the mat </s>",
    ]
    assert batch.sequences.response_lengths.tolist() == [3, 2, 2, 5]
    assert batch.label.tolist() == [0.75, 0.5]
    assert batch.margin.tolist() == [0.5, 0.0]
    assert batch.index.tolist() == [0, 1]
    assert batch.categories == (None, "qa")
    assert (batch.share.examples.item(), batch.share.tokens.item()) == (2, 12)
    assert [b.label.tolist() for b in make(PreferenceData, word, path, batch_size=2).loader("train")] == [[1, 1]]


def test_training_batches_follow_the_plan(word, write):
    data = make(PreferenceData, word, write(rows()), batch_size=8)
    loader = data.train_dataloader()
    batches = list(loader)
    items = data.examples("train").items
    assert sorted(i for b in batches for i in b.index.tolist()) == list(range(40))
    assert batches[0].index.tolist() != list(range(8))
    for batch in batches:
        pairs = [items[i] for i in batch.index.tolist()]
        assert batch.sequences.response_lengths.tolist() == [
            p.encoded[side].response_length for side in (0, 1) for p in pairs
        ]
        assert batch.share.tokens == sum(pair.tokens for pair in pairs)


def test_batch_makers_travel_to_workers(word, write):
    for kind, train in ((PreferenceData, rows()), (SFTData, rows()), (PromptData, rows())):
        data = (
            make(kind, word, write(train), max_new_tokens=4) if kind is PromptData else make(kind, word, write(train))
        )
        loader = data.train_dataloader()
        maker = pickle.loads(pickle.dumps(loader.make))
        assert torch.equal(maker(loader.planner.epoch(0)[0]).index, next(iter(loader)).index)


def test_ranked_rows_train_too(word, write):
    path = write([{"prompt": "the cat", "responses": ["sat", "ran", "slept"], "rank": [2, 1, 3]}])
    items = make(PreferenceData, word, path).examples("train").items
    assert [(i.row.chosen, i.row.rejected) for i in items] == [("sat", "slept"), ("ran", "sat"), ("ran", "slept")]


def test_sft_batches(word, write):
    path = write([{"prompt": "the cat", "response": "sat"}, {"text": "dog ran"}, rows()[0]])
    data = make(SFTData, word, path, batch_size=3)
    (batch,) = data.loader("train")
    ids, mask = batch.sequences.ids, batch.sequences.response_mask
    assert [decoded(data, i[m]) for i, m in zip(ids, mask, strict=True)] == [
        "sat </s>",
        "dog ran </s>",
        "the cat sat </s>",
    ]
    assert (batch.share.examples, batch.share.tokens, batch.index.tolist()) == (3, 9, [0, 1, 2])


def test_prompt_batches(word, write):
    long = {"prompt": "the cat sat on the mat then slept", "category": "qa"}
    data = make(PromptData, word, write([*rows(4, category="chat"), long]), max_new_tokens=8, batch_size=4)
    assert [b.prompts for b in data.loader("train")] == [("cat cat ran", "dog cat ran")]
    (batch,) = data.loader("train")
    assert (batch.index.tolist(), batch.categories) == ([0, 1], ("chat", "chat"))
    dropped = data.examples("train").dropped
    assert dropped["the prompt occurred before"] == 2
    assert dropped.total() == 3


# -- splits ----------------------------------------------------------------------------------------------------------


def test_validation_is_split_off_by_prompt(word, write):
    data = make(PreferenceData, word, write(rows(60)), validation_fraction=0.3)
    train, validation = prompts_of(data, "train"), prompts_of(data, "validation")
    assert train.isdisjoint(validation)
    assert len(train | validation) == 30
    assert 3 <= len(validation) <= 15
    turned = make(PreferenceData, word, write(rows(60)[::-1], "turned.jsonl"), validation_fraction=0.3, seed=5)
    assert prompts_of(turned, "validation") == validation
    part = make(PreferenceData, word, write(rows(60)[:30], "part.jsonl"), validation_fraction=0.3)
    assert prompts_of(part, "validation") <= validation


def test_the_split_is_the_same_in_every_process():
    assert held_out_groups(set("abcdefghij"), 0.3) == set("bcdefj")
    assert held_out_groups({"a"}, 0.3) == set()


def test_prompts_that_differ_in_case_and_spacing_stay_together(word, write):
    alike = [row | {"prompt": row["prompt"].upper().replace(" ", "  ")} for row in rows(24)]
    data = make(PreferenceData, word, write(rows(24) + alike), validation_fraction=0.3)
    groups = [{item.row.group for item in data.examples(split).items} for split in ("train", "validation")]
    assert groups[0].isdisjoint(groups[1])


def test_few_prompts_still_give_both_splits(word, write):
    data = make(PreferenceData, word, write(rows(4)), validation_fraction=0.01)
    assert (len(prompts_of(data, "train")), len(prompts_of(data, "validation"))) == (1, 1)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: all rows have one prompt"):
        make(PreferenceData, word, write(rows(2)), validation_fraction=0.1)


def test_a_validation_file_is_used_as_it_is(word, write):
    data = make(
        PreferenceData, word, write(rows(12)), validation=write(rows(4), "dev.jsonl"), test=write(rows(6), "test.jsonl")
    )
    data.setup("test")
    assert [len(data.examples(split).items) for split in ("train", "validation", "test")] == [12, 4, 6]
    assert sum(len(batch.index) for batch in data.test_dataloader()) == 6


def test_no_validation_and_no_test(word, write):
    data = make(PreferenceData, word, write(rows(12)))
    assert data.val_dataloader() == []
    assert not data.has_validation
    with pytest.raises(UserError, match="no test rows: expected `test`"):
        data.setup("test")


def test_sources_mix_and_limit_counts_each(word, write):
    paths = [write(rows(12), "a.jsonl"), write(rows(6), "b.jsonl")]
    assert len(make(PreferenceData, word, paths).examples("train").items) == 18
    items = make(PreferenceData, word, paths, limit=4).examples("train").items
    assert [str(item.row.origin).rpartition("/")[2] for item in items[3:5]] == ["a.jsonl:4", "b.jsonl:1"]


def test_probe_prompts_are_different_and_always_the_same(word, write):
    train, turned = write(rows(40, category="chat")), write(rows(40, category="chat")[::-1], "turned.jsonl")
    probes = make(PreferenceData, word, train).probe_prompts(8)
    assert len({prompt for prompt, _ in probes}) == 8
    assert {category for _, category in probes} == {"chat"}
    assert (
        probes
        == make(PreferenceData, word, turned).probe_prompts(8)
        == make(PreferenceData, word, train).probe_prompts(20)[:8]
    )
    held_out = make(PreferenceData, word, train, validation_fraction=0.3)
    assert {p for p, _ in held_out.probe_prompts(99)} == prompts_of(held_out, "validation")


# -- what is dropped, cut or refused ---------------------------------------------------------------------------------


def test_rows_are_counted_with_their_reasons(word, write):
    long = {"prompt": "the cat sat on the mat", "chosen": "a", "rejected": "b"}
    same = {"prompt": "the", "chosen": "cat", "rejected": "cat"}
    cut = {"prompt": "the", "chosen": "cat sat on the mat then slept", "rejected": "no"}
    alike = {"prompt": "the", "chosen": "dog sat on the mat", "rejected": "dog sat on the tree"}
    data = make(PreferenceData, word, write([long, same, cut, alike, *rows(2)]), max_length=6)
    text = "the prompt leaves too little of the window, 6 tokens, for a response"
    assert data.examples("train").dropped == {text: 1, "chosen and rejected are the same tokens": 2}
    assert data.examples("train").truncated == 1 + 2
    assert data.report()[0].endswith(
        f"6 rows read, 3 kept, 3 dropped (1 x {text}; 2 x chosen and rejected are the same tokens),"
        " 3 responses cut at the window"
    )


def test_long_prompts_can_stop_the_run_or_keep_their_end(word, write):
    path = write([*rows(2), {"prompt": "the cat sat on the mat", "chosen": "a", "rejected": "i"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:3: `prompt` has 7 tokens; .*window of 6 tokens"):
        make(PreferenceData, word, path, max_length=6, long_prompts="error")
    data = make(PreferenceData, word, path, max_length=6, long_prompts="keep_end")
    assert decoded(data, data.examples("train").items[2].encoded[0].ids) == "<s> on the mat a </s>"


def test_no_row_left_names_the_first(word, write):
    with pytest.raises(UserError, match=r"none of 2 rows .*rows\.jsonl:1: `prompt` has 4 tokens; .*window of 4 tokens"):
        make(PreferenceData, word, write(rows(2)), max_length=4)
    same = [{"prompt": "the", "chosen": "cat", "rejected": "cat"}]
    with pytest.raises(UserError, match=r"none of 1 rows .*same tokens\): .*rows\.jsonl:1"):
        make(PreferenceData, word, write(same))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction must be in"),
        ({"limit": 0}, "limit must be >= 1"),
        ({"train": []}, "`train` is an empty list"),
        ({"max_length": 1}, "max_length must be >= 2"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_bad_settings_are_refused(word, write, options, message):
    with pytest.raises(UserError, match=message):
        make(PreferenceData, word, **{"train": write(rows())} | options).train_dataloader()
    with pytest.raises(UserError, match="max_new_tokens must be >= 1"):
        PromptData(word, max_new_tokens=0)


# -- what is said and kept -------------------------------------------------------------------------------------------


def test_report_shows_the_first_example_with_its_mask(write, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "byte")
    message = [{"role": "user", "content": "why?"}]
    path = write([row | {"prompt": message} for row in rows(4)])
    lines = make(PreferenceData, str(tmp_path / "byte"), path, max_length=64).report()
    start = f"first example, {path}:1: 'user: why?\\nassistant:'"
    assert lines[1] == f"{start} [' the cat sat<|endoftext|>']"
    assert lines[2] == f"{start} [' no<|endoftext|>']"
    assert lines[3].startswith("the tokenizer has no chat template")


def test_report_says_where_validation_came_from(word, write):
    lines = make(PreferenceData, word, write(rows()), validation_fraction=0.3).report()
    assert lines[-1].startswith("validation (split off train by prompt): ")


def test_fingerprint_follows_the_tokens(word, write):
    path = write(rows())
    first = make(PreferenceData, word, path).fingerprint
    assert first == make(PreferenceData, word, path, seed=3, batch_size=2).fingerprint
    changed = [row | ({"chosen": "on"} if i == 7 else {}) for i, row in enumerate(rows())]
    others = [
        make(PreferenceData, word, write(changed, "changed.jsonl")).fingerprint,
        make(PreferenceData, word, path, joiner=" please ").fingerprint,
        make(PreferenceData, word, path, max_length=6).fingerprint,
        make(PreferenceData, word, path, limit=30).fingerprint,
        make(SFTData, word, path).fingerprint,
    ]
    assert len({first, *others}) == 6


def test_settings_are_kept_as_plain_values(word, write):
    path = write(rows())
    data = make(PreferenceData, word, [path], soft_labels=True)
    assert data.hparams["train"] == [path]
    assert data.hparams["soft_labels"] is True
    assert json.loads(json.dumps(dict(data.hparams))) == dict(data.hparams)
    again = PreferenceData(**data.hparams)
    again.setup("fit")
    assert again.fingerprint == data.fingerprint


def test_gold_comes_with_the_built_in_world_alone(word, write):
    assert PreferenceData(word).gold is not None
    assert PreferenceData(word, train=["builtin:world"]).gold is not None
    assert PreferenceData(word, train=write(rows())).gold is None
    assert PreferenceData(word, train=["builtin:world", write(rows())]).gold is None


@pytest.mark.parametrize("kind", [PreferenceData, SFTData, PromptData])
def test_the_built_in_world_loads(tmp_path, kind):
    from lit_rlhf.data.synthetic import CATEGORIES, build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    data = kind(str(tmp_path), limit=50)
    data.setup("fit")
    data.setup("test")
    assert [len(data.examples(split).items) for split in ("train", "validation", "test")] == [50, 50, 50]
    assert {category for _, category in data.probe_prompts(50)} == set(CATEGORIES)
    groups = [{item.row.group for item in data.examples(split).items} for split in ("train", "validation", "test")]
    assert groups[0].isdisjoint(groups[1] | groups[2])
    row = data.examples("train").items[0]
    for answer, encoded in zip(row.row.answers, row.encoded, strict=True):
        assert data.encoder.response_text(encoded.ids[encoded.prompt_length :]) == answer
        assert data.encoder.tokenizer.unk_token_id not in encoded.ids


class Watcher(LightningModule):
    """Remembers the rows of its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen += batch.index.tolist()
        return (self.weight * batch.margin).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.index.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_trainer(word, write, tmp_path):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, **quiet)
    data = PreferenceData(word, train=write(rows()), max_length=16, validation_fraction=0.3)
    watcher = Watcher()
    trainer.fit(watcher, data)
    assert sorted(watcher.seen) == list(range(len(data.examples("train").items)))
    assert watcher.validated == list(range(len(data.examples("validation").items)))
