"""Steps hold the same rows however they are cut up, sums become exact means, and a run goes on where it stopped."""

import copy
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.data.batching import ResumableLoader, StepPlanner
from lit_rlhf.types import UserError


def tokens(n):
    return np.random.default_rng(0).integers(1, 20, n).tolist()


def plans(n, batch_size, world_size=1, accumulate=1, **options):
    """The planners of all ranks."""
    sizes = {"batch_size": batch_size, "world_size": world_size, "accumulate": accumulate}
    return [StepPlanner(tokens(n), rank=rank, **sizes, **options) for rank in range(world_size)]


def steps(n, batch_size, world_size=1, accumulate=1, epoch=0, **options):
    """The micro-batches of each optimizer step, of all ranks."""
    ranks = [p.epoch(epoch) for p in plans(n, batch_size, world_size, accumulate, **options)]
    starts = range(0, len(ranks[0]), accumulate)
    return [[micro for rank in ranks for micro in rank[start : start + accumulate]] for start in starts]


# -- plans -----------------------------------------------------------------------------------------------------------

SHAPES = [(48, 4, 1, 1), (50, 4, 2, 1), (50, 1, 1, 8), (53, 2, 2, 3), (45, 1, 2, 4), (49, 8, 2, 1), (5, 8, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_sums_over_shares_add_up_to_the_mean_of_the_step(shape, unit):
    n, _, world_size, accumulate = shape
    loss = np.random.default_rng(1).normal(size=n)
    for step in steps(*shape):
        rows = [row for micro in step for row in micro.rows]
        count = len(rows) if unit == "examples" else sum(tokens(n)[row] for row in rows)
        # what Lightning makes of it: each micro-batch over `accumulate`, summed; the mean over ranks
        shares = [loss[list(micro.rows)].sum() / getattr(micro, unit) for micro in step]
        assert sum(shares) / accumulate / world_size == pytest.approx(loss[rows].sum() / count, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_share_the_rows_and_see_equally_many_batches(shape):
    n, batch_size, *_ = shape
    ranks = [planner.epoch(0) for planner in plans(*shape)]
    rows = [row for rank in ranks for micro in rank for row in micro.rows]
    assert len(rows) == len(set(rows)) == n - plans(*shape)[0].dropped
    assert {len(rank) for rank in ranks} == {len(plans(*shape)[0])}
    assert all(1 <= len(micro.rows) <= max(2, batch_size) for rank in ranks for micro in rank)
    assert plans(*shape)[0].dropped == (1 if shape == (49, 8, 2, 1) else 0)


@pytest.mark.parametrize("n", [48, 53])
@pytest.mark.parametrize("cut", [(4, 2, 1), (1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 4, 2)])
def test_a_step_has_the_same_rows_however_it_is_cut(n, cut):
    def rows(*shape):
        return [sorted(row for micro in step for row in micro.rows) for step in steps(n, *shape, seed=3)]

    assert rows(*cut) == rows(8)


def test_order_depends_on_seed_and_epoch_alone():
    (planner,), other = plans(50, 4, seed=1), plans(50, 4, 2, seed=1)[1]
    assert planner.order(0) == other.order(0)
    assert planner.order(0) != planner.order(1) != plans(50, 4, seed=2)[0].order(1)
    assert sorted(planner.order(1)) == list(range(50))


def test_rows_fewer_than_ranks_are_dropped_and_counted():
    assert [p.dropped for p in plans(17, 4, 2)] == [1, 1]
    assert plans(18, 4, 2)[0].dropped == 0
    assert plans(17, 4)[0].dropped == 0


@pytest.mark.parametrize("shape", [(50, 4, 2), (49, 8, 2), (17, 4, 1), (3, 1, 2), (3, 8, 3)])
def test_evaluation_sees_every_row_once_and_in_order(shape):
    ranks = [planner.epoch(5) for planner in plans(*shape, training=False)]
    dealt = [micro for together in zip(*ranks, strict=True) for micro in together]
    assert [row for micro in dealt for row in micro.rows] == list(range(shape[0]))
    assert all(micro.examples == len(micro.rows) for micro in dealt)
    assert all(micro.tokens == sum(tokens(shape[0])[row] for row in micro.rows) for micro in dealt)
    assert plans(*shape, training=False)[0].dropped == 0


def test_impossible_plans_are_refused():
    with pytest.raises(UserError, match="batch_size must be >= 1, got 0"):
        StepPlanner([1, 2], batch_size=0)
    with pytest.raises(UserError, match="2 rows cannot be shared by 3 processes"):
        StepPlanner([1, 2], batch_size=1, world_size=3)


# -- the loader ------------------------------------------------------------------------------------------------------


def loader(n=20, batch_size=3, make=None, **options):
    return ResumableLoader(StepPlanner(tokens(n), batch_size, **options), make or (lambda micro: micro.rows))


def test_a_loaded_position_is_continued_once():
    whole, first, second = loader(), loader(), loader()
    for one in (whole, first):
        one.set_epoch(2)
    batches = list(whole)
    assert len(batches) == len(whole) == 7
    started = iter(first)
    seen = [next(started) for _ in range(3)]
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    second.set_epoch(2)
    assert seen + list(second) == batches
    assert list(second) == batches
    second.load_state_dict(first.state_dict())
    for one in (second, whole):
        one.set_epoch(3)
    assert list(second) == list(whole) != batches


def test_the_epoch_may_be_announced_after_the_iterator_is_made():
    one, other = loader(), loader()
    batches = iter(one)
    one.set_epoch(4)
    other.set_epoch(4)
    assert list(batches) == list(other)


def test_a_position_inside_an_epoch_needs_the_same_plan():
    saved = loader()
    next(iter(saved))
    with pytest.raises(UserError, match=r"batch_size 3 \(now 4\).*end of an epoch"):
        loader(batch_size=4).load_state_dict(saved.state_dict())
    list(saved)
    finished = loader(batch_size=4)
    finished.load_state_dict(saved.state_dict())
    assert list(finished) == []


def test_loading_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(torch.get_rng_state(), before)


# -- with Lightning --------------------------------------------------------------------------------------------------


class Regression(LightningModule):
    """Squared error of a line through fixed points; remembers what it saw."""

    def __init__(self, data):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
        self.data = data
        self.seen = []

    def training_step(self, batch, batch_idx):
        rows, share = batch
        self.seen.append((self.current_epoch, rows))
        x = torch.tensor(rows, dtype=torch.float64) / 10
        loss = (self.weight[0] * x + self.weight[1] - x.square()).square().sum()
        return loss / share.double()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self):
        make = lambda micro: (micro.rows, micro.share.examples)  # noqa: E731
        return loader(*self.data, make=make, accumulate=self.trainer.accumulate_grad_batches)

    def val_dataloader(self):
        return loader(*self.data, make=lambda micro: micro.rows, training=False)


def fit(module, folder, ckpt_path=None, callbacks=(), **options):
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, default_root_dir=folder, callbacks=list(callbacks), **plain, **options
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=False)
    return module


@pytest.mark.parametrize("n", [16, 20, 21])
def test_accumulation_changes_nothing_in_lightning(tmp_path, n):
    whole = fit(Regression((n, 8)), tmp_path, enable_checkpointing=False)
    for batch_size, accumulate in ((1, 8), (2, 4), (4, 2)):
        module = Regression((n, batch_size))
        cut = fit(module, tmp_path, accumulate_grad_batches=accumulate, enable_checkpointing=False)
        torch.testing.assert_close(cut.weight, whole.weight, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves nothing
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("interval", [1.0, 2])
def test_resumed_runs_see_what_uninterrupted_ones_see(tmp_path, accumulate, interval):
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": interval}
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    after_epoch = ModelCheckpoint(tmp_path, "epoch{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(Regression((20, 3)), tmp_path, callbacks=[every_step, after_epoch], **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == whole.trainer.global_step + 3
    for checkpoint in checkpoints:
        saved = torch.load(checkpoint, weights_only=False)
        left = copy.deepcopy(whole.seen)[saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] :]
        resumed = fit(Regression((20, 3)), tmp_path, checkpoint, enable_checkpointing=False, **options)
        assert resumed.seen == left, checkpoint.name
        torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)
