"""Several orders of the same rows side by side: each stream is what it is alone, however the steps are cut."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import word_tokenizer

from lit_rlhf.data import PreferenceData
from lit_rlhf.data.batching import ResumableLoader, StepPlanner
from lit_rlhf.types import UserError

TOKENS = [3 + row % 5 for row in range(53)]
STREAMS = (0, 1, 2)


def planner(batch_size, world_size=1, rank=0, accumulate=1, streams=STREAMS, **options):
    return StepPlanner(TOKENS, batch_size, world_size, rank, accumulate, 3, streams=streams, **options)


def rows_of(micro, stream):
    size = len(micro.rows) // micro.streams
    return micro.rows[stream * size : (stream + 1) * size]


def test_each_stream_is_the_plan_it_would_be_alone():
    together = planner(4).epoch(2)
    for place, stream in enumerate(STREAMS):
        alone = planner(4, streams=(stream,)).epoch(2)
        assert [rows_of(micro, place) for micro in together] == [micro.rows for micro in alone]
        assert sorted(row for micro in alone for row in micro.rows) == list(range(len(TOKENS)))
    for micro, *parts in zip(together, *(planner(4, streams=(s,)).epoch(2) for s in STREAMS), strict=True):
        assert micro.examples == sum(part.examples for part in parts)
        assert micro.tokens == sum(part.tokens for part in parts)


def test_the_first_stream_is_the_order_there_was_before_there_were_streams():
    assert planner(4).order(1) == StepPlanner(TOKENS, 4, seed=3).order(1)
    assert planner(4).order(1, 0) != planner(4).order(1, 1) != planner(4).order(2, 1)
    assert planner(4).order(1, 1) == np.random.default_rng([3, 1, 1]).permutation(len(TOKENS)).tolist()


@pytest.mark.parametrize("cut", [(4, 2, 1), (1, 1, 8), (2, 2, 2)])
def test_a_step_of_every_stream_has_the_same_rows_however_it_is_cut(cut):
    def steps(batch_size, world_size, accumulate):
        ranks = [planner(batch_size, world_size, rank, accumulate).epoch(0) for rank in range(world_size)]
        starts = range(0, len(ranks[0]), accumulate)
        for start in starts:
            micros = [micro for rank in ranks for micro in rank[start : start + accumulate]]
            # what Lightning makes of shares: the mean over ranks of the sum over micro-batches divided by `accumulate`
            total = sum(len(m.rows) / m.examples for m in micros) / accumulate / world_size
            assert total == pytest.approx(1, rel=1e-12)
            yield [sorted(row for micro in micros for row in rows_of(micro, s)) for s in range(len(STREAMS))]

    assert list(steps(*cut)) == list(steps(8, 1, 1))


def test_evaluation_has_one_order():
    micros = planner(4, streams=(0,), training=False).epoch(0)
    assert [row for micro in micros for row in micro.rows] == list(range(len(TOKENS)))


def test_a_position_is_continued_exactly_and_only_with_the_same_streams():
    def loader(streams=STREAMS):
        return ResumableLoader(planner(4, streams=streams), lambda micro: micro.rows)

    whole, cut, resumed = loader(), loader(), loader()
    batches = list(whole)
    started = iter(cut)
    seen = [next(started) for _ in range(5)]
    state = pickle.loads(pickle.dumps(cut.state_dict()))
    resumed.load_state_dict(state)
    assert seen + list(resumed) == batches
    with pytest.raises(UserError, match=r"streams \[0, 1, 2\] \(now \[0, 1\]\)"):
        loader((0, 1)).load_state_dict(state)


@pytest.fixture
def data(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    nouns = ["cat", "dog", "bird", "tree", "mat", "rain"]
    rows = [
        {"prompt": f"{a} {b}", "chosen": "sat", "rejected": "no " * (1 + i % 3), "margin": float(i)}
        for i, (a, b) in enumerate((a, b) for a in nouns for b in nouns if a != b)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**options):
        data = PreferenceData(
            str(tmp_path), train=str(tmp_path / "rows.jsonl"), validation=str(tmp_path / "rows.jsonl"), **options
        )
        data.setup("fit")
        return data

    return make


def test_a_batch_holds_the_streams_one_after_the_other(data):
    batch = next(iter(data(streams=[1, 4], batch_size=3, max_length=16).train_dataloader()))
    assert batch.streams == 2
    assert batch.sequences.ids.shape[0] == 2 * 2 * 3
    assert torch.equal(batch.margin, batch.index.float())
    assert batch.share.examples == 6
    for place, stream in enumerate((1, 4)):
        alone = next(iter(data(streams=[stream], batch_size=3, max_length=16).train_dataloader()))
        assert torch.equal(batch.index[3 * place : 3 * place + 3], alone.index)
        block = slice(6 * place, 6 * place + 6)
        width = alone.sequences.ids.shape[1]
        assert torch.equal(batch.sequences.ids[block, :width], alone.sequences.ids)
        assert torch.equal(batch.sequences.response_mask[block, :width], alone.sequences.response_mask)


def test_validation_has_one_stream(data):
    assert next(iter(data(streams=3, max_length=16).val_dataloader())).streams == 1


@pytest.mark.parametrize("streams", [0, [], [2, 2], [-1]])
def test_impossible_streams_are_refused(data, streams):
    with pytest.raises(UserError, match="streams must be a count >= 1"):
        data(streams=streams)
