"""Training an ensemble: members as alone, one run, exact resumes, a scale for each, and what is logged."""

import json
import math
from itertools import cycle

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.data import PreferenceData
from lit_rlhf.functional.aggregation import UncertaintyWeighted, WorstCase
from lit_rlhf.loading import load
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.models.reward import load as load_scorer
from lit_rlhf.modules import PreferenceModule, RewardEnsembleModule, RewardModule
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.modules.reward import graded
from lit_rlhf.types import UserError
from tests.modules.test_modules import FAST, Kill, Losses, fit, state

SGD = Optimizer(name="sgd", lr=0.1)
LORA = LoRA(r=4, alpha=8)


def pairs(streams=3, batch_size=8, **options):
    return PreferenceData(tokenizer="builtin:policy", batch_size=batch_size, limit=48, streams=streams, **options)


def ensemble(members=3, mode="lora", **options):
    options = {"optimizer": SGD, "lora": LORA if mode == "lora" else None, "seed": 0} | options
    return RewardEnsembleModule(members=members, mode=mode, **options)


def scores(module):
    return module.reward_model.eval()(next(iter(prepared(pairs()).val_dataloader())).sequences).detach()


def prepared(data):
    data.setup("fit")
    return data


@pytest.mark.parametrize("clip", [None, 0.3])  # norms are 0.5 to 2 here
@pytest.mark.parametrize("mode", ["lora", "full", "heads"])
def test_a_member_trains_in_company_as_it_trains_alone(mode, clip):
    together, alone = ensemble(mode=mode), ensemble([2], mode)
    fit(together, pairs(), gradient_clip_val=clip)
    fit(alone, pairs([2]), gradient_clip_val=clip)
    torch.testing.assert_close(scores(together)[:, 2:], scores(alone), rtol=0, atol=1e-5)
    assert (scores(together)[:, 2] - scores(together)[:, 1]).abs().max() > 1e-3


def test_a_full_member_is_an_ordinary_reward_model_in_training():
    """One member in mode "full" and `RewardModule`, from the same head: equal losses and weights."""
    plain, one = RewardModule(optimizer=SGD), ensemble(1, "full")
    for module in (plain, one):
        module.configure_model()
    plain.reward_model.head.load_state_dict(one.reward_model.heads.each[0].state_dict())
    ends = []
    for module in (plain, one):
        losses = Losses()
        fit(module, pairs(1), losses)
        ends.append(losses.values)
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)
    torch.testing.assert_close(plain.reward_model.head.weight, one.reward_model.heads.each[0].weight)


@pytest.mark.parametrize("mode", ["lora", "full", "heads"])
def test_accumulation_gives_the_same_update(mode):
    ends = []
    for batch_size, accumulate in ((8, 1), (1, 8), (2, 4)):
        module = ensemble(mode=mode)
        fit(module, pairs(batch_size=batch_size), steps=2, accumulate_grad_batches=accumulate)
        ends.append(state(module))
    for name, value in ends[0].items():
        for other in ends[1:]:
            assert (other[name] - value).abs().max() < 1e-6, name


@pytest.mark.parametrize("stop", [2, 6, 8])
def test_resuming_equals_not_having_stopped(tmp_path, stop):
    def build():
        return ensemble(optimizer=Optimizer(lr=1e-3, warmup_ratio=0.5))

    whole, first, second = Losses(), Losses(), Losses()
    plan = {"steps": -1, "max_epochs": 2}  # six steps an epoch
    straight, resumed = build(), build()
    fit(straight, pairs(), whole, **plan)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    with pytest.raises(KeyboardInterrupt):
        fit(build(), pairs(), first, saver, Kill(stop + 1), **plan)
    fit(resumed, pairs(), second, saver, **plan, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert len(whole.values) == 12
    assert first.values[:stop] + second.values == whole.values
    for name, value in state(straight).items():
        assert torch.equal(state(resumed)[name], value), name


def test_dropout_is_on_in_training_also_after_a_validation():
    module = ensemble(lora=LoRA(r=4, alpha=8, dropout=0.5))
    module.configure_model()
    modes = []
    layer = next(iter(module.reward_model.bodies[0].expert_layers.values()))
    layer.dropout.register_forward_hook(lambda part, *_: modes.append(part.training))
    fit_and_validate(module, pairs(), steps=2, every=1, limit=1)
    assert modes == [True, False, True, False]


def fit_and_validate(module, data, steps, every=None, limit=None):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=every or steps, limit_val_batches=limit, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


# -- scale, and what is logged ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    torch.manual_seed(0)
    module = ensemble(optimizer=FAST, aggregator=WorstCase())
    trainer = fit_and_validate(module, pairs(), steps=4)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    folder = tmp_path_factory.mktemp("run")
    trainer.save_checkpoint(folder / "it.ckpt")
    module.export(str(folder / "hf"))
    return module.eval(), metrics, folder


def held_out():
    rows = [item.row for item in prepared(pairs()).examples("validation").items]
    return [r.prompt for r in rows], [r.chosen for r in rows], [r.rejected for r in rows]


def test_each_member_keeps_the_scale_of_its_scores_on_held_out_responses(validated):
    module, _, folder = validated
    prompts, chosen, rejected = held_out()
    raw = load_scorer(str(folder / "hf"), raw=True).score(prompts * 2, chosen + rejected).members
    model = module.reward_model
    torch.testing.assert_close(model.score_mean, raw.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.score_std, raw.std(0, correction=0), rtol=1e-4, atol=0)
    scaled = load_scorer(str(folder / "hf")).score(prompts * 2, chosen + rejected).members
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0)


def test_validation_logs_how_the_members_agree(validated):
    _, metrics, folder = validated
    prompts, chosen, rejected = held_out()
    scorer = load_scorer(str(folder / "hf"), aggregator=WorstCase())
    better, worse = scorer.score(prompts, chosen), scorer.score(prompts, rejected)
    members = torch.cat([better.members, worse.members])
    wins = (better.total > worse.total).float()
    assert metrics["val/reward/accuracy"] == pytest.approx(wins.mean().item())
    for k in range(3):
        own = (better.members[:, k] > worse.members[:, k]).float().mean().item()
        assert metrics[f"val/ensemble/accuracy/{k}"] == pytest.approx(own)
        share = (members.argmin(1) == k).float().mean().item()
        assert metrics[f"val/ensemble/min_member/{k}"] == pytest.approx(share)
    assert metrics["val/ensemble/std"] == pytest.approx(members.std(1, correction=0).mean().item(), rel=1e-3)
    correlation = torch.corrcoef(members.T)[[0, 0, 1], [1, 2, 2]].mean().item()
    assert metrics["val/ensemble/correlation"] == pytest.approx(correlation, abs=1e-4)


def test_training_logs_each_member():
    trainer = fit(ensemble(), pairs(), steps=1)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    own = [found[f"ensemble/accuracy/{k}"] for k in range(3)]
    assert found["reward/accuracy"] == pytest.approx(sum(own) / 3)
    assert found["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert {"reward/margin", "reward/mean", "loss/preference"} <= found.keys()


def test_one_member_has_no_disagreement_to_log():
    module = ensemble(1)
    metrics = fit_and_validate(module, pairs(1), steps=2).callback_metrics
    assert metrics["val/ensemble/std"] == 0
    assert metrics["val/ensemble/min_member/0"] == 1
    assert "val/ensemble/correlation" not in metrics


def voted(path, votes):
    """Write held-out pairs with votes for chosen and rejected, by turns, and return them."""
    lines = [
        {"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected}
        | {"votes": {"chosen": vote[0], "rejected": vote[1], "tie": 0}}
        for r, vote in zip((item.row for item in prepared(pairs()).examples("validation").items), cycle(votes))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_soft_labels_are_graded_by_their_majority():
    wins = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 0.0])
    label = torch.tensor([0.6, 0.4, 0.1, 0.9, 0.5, 0.5])
    assert graded(wins, label).tolist() == [1, 0, 1, 0.5]
    torch.testing.assert_close(graded(1 - wins, 1 - label), graded(wins, label))


@pytest.mark.parametrize("kind", [RewardModule, ensemble])
def test_accuracies_agree_with_soft_labels(kind, tmp_path):
    """Votes against half of the pairs: a mirrored row is right where the row itself is; even votes count nowhere."""
    lines = voted(tmp_path / "v.jsonl", [(3, 1), (1, 3), (2, 2)])
    module = kind(optimizer=FAST)
    streams = 1 if kind is RewardModule else 3
    data = pairs(streams, validation=str(tmp_path / "v.jsonl"), soft_labels=True)
    metrics = fit_and_validate(module, data, steps=2).callback_metrics
    prompts, chosen, rejected = ([line[k] for line in lines] for k in ("prompt", "chosen", "rejected"))
    module.eval()
    wins = (module.score(prompts, chosen).total > module.score(prompts, rejected).total).float()
    right = [w if k % 3 == 0 else 1 - w for k, w in enumerate(wins.tolist()) if k % 3 < 2]
    assert 0 < sum(right) < len(right)
    assert metrics["val/reward/accuracy"] == pytest.approx(sum(right) / len(right))


def test_a_collapsed_member_has_no_scale_and_no_correlation():
    """A head of zeros scores all alike. Raw scores go on without it; on one scale there is no such member."""
    module = ensemble(mode="heads", raw=True, optimizer=Optimizer(name="sgd", lr=1e-30))
    module.configure_model()
    torch.nn.init.zeros_(module.reward_model.heads.each[1].weight)
    with pytest.warns(UserWarning, match=r"scored alike by members \[1\]; no scale"):
        metrics = fit_and_validate(module, pairs(), steps=1).callback_metrics
    assert module.reward_model.score_std.isfinite().tolist() == [True, False, True]
    assert "val/ensemble/accuracy/1" in metrics
    assert not {"val/ensemble/correlation", "val/ensemble/std", "val/ensemble/min_member/0"} & metrics.keys()
    assert all(value.isfinite() for value in metrics.values())
    module.raw = False
    with pytest.warns(UserWarning, match="scored alike"), pytest.raises(UserError, match=r"members \[1\] of 3 keep no"):
        fit_and_validate(module, pairs(), steps=1)


def test_standardised_scores_are_asked_of_a_measured_scale_alone():
    module = ensemble(mode="heads")
    fit(module, pairs(), steps=1)  # no validation
    with pytest.raises(UserError, match="a `fit` measures them in its validation"):
        module.score(["the cat"], ["sat"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UserError, match="a `fit` measures them in its validation"):
        trainer.validate(module, pairs(), verbose=False)


# -- in and out ------------------------------------------------------------------------------------------------------


def test_every_way_back_gives_the_same_scores(validated):
    module, _, folder = validated
    prompts, chosen, _ = held_out()
    expected = module.score(prompts, chosen)
    assert expected.members.shape == (len(prompts), 3)
    torch.testing.assert_close(expected.total, expected.members.amin(1))
    checkpoint = load(str(folder / "it.ckpt"))
    assert checkpoint.aggregator == WorstCase()
    for found in (
        checkpoint.score(prompts, chosen).members,
        load(str(folder / "hf")).score(prompts, chosen).members,
        load_scorer(str(folder / "hf")).score(prompts, chosen).members,
    ):
        torch.testing.assert_close(found, expected.members, rtol=0, atol=1e-5)


def test_a_folder_can_be_trained_on(validated):
    *_, folder = validated
    module = ensemble(model_name_or_path=str(folder / "hf"), lora=None)
    trainer = fit(module, pairs(), steps=2)
    trainer.save_checkpoint(folder / "again.ckpt")
    again = load(str(folder / "again.ckpt"))
    torch.testing.assert_close(scores(again), scores(module), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"has mode 'lora' and 3 members; model.mode and members say mode 'lora' and 2"):
        ensemble(2, model_name_or_path=str(folder / "hf"), lora=None).configure_model()
    with pytest.raises(UserError, match="adapters of its own"):
        ensemble(model_name_or_path=str(folder / "hf")).configure_model()


def test_checkpoints_hold_what_is_trained_only(validated):
    *_, folder = validated
    kept = torch.load(folder / "it.ckpt", weights_only=True)["state_dict"]
    assert all(name.endswith((".A", ".B")) or ".heads." in name or "score_" in name for name in kept)


def test_zero_weight_of_uncertainty_is_kept_as_zero(tmp_path):
    module = ensemble(aggregator=UncertaintyWeighted(coefficient=0.0))
    trainer = fit(module, pairs(), steps=1)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert load(str(tmp_path / "it.ckpt")).aggregator == UncertaintyWeighted(coefficient=0.0)


def test_members_share_their_rows_and_labels(tmp_path):
    """Data order is all that differs: over an epoch each member meets the same pairs with the same labels, once."""
    lines = voted(tmp_path / "v.jsonl", [(k, 50 - k) for k in range(50)])
    data = prepared(pairs(train=str(tmp_path / "v.jsonl"), soft_labels=True))
    items = data.examples("train").items
    expected = [(item.encoded[0].ids, item.encoded[1].ids, item.row.preference) for item in items]
    seen = [[], [], []]
    for batch in data.train_dataloader():
        ids, mask = batch.sequences.ids, batch.sequences.attention_mask
        rows = [tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
        size = len(rows) // 6
        for k, labels in enumerate(batch.label.chunk(3)):
            chosen, rejected = rows[2 * k * size : (2 * k + 1) * size], rows[(2 * k + 1) * size : (2 * k + 2) * size]
            seen[k] += zip(chosen, rejected, labels.tolist(), strict=True)
    assert len({label for *_, label in expected}) == len(expected) <= len(lines)
    every = sorted((tuple(a), tuple(b), pytest.approx(label)) for a, b, label in expected)
    assert all(sorted(own) == every for own in seen)
    assert len({tuple(own) for own in seen}) == 3


@pytest.mark.parametrize(
    ("module", "streams"),
    [(lambda: ensemble(3), 1), (lambda: ensemble(3), 2), (lambda: ensemble([2]), 1), (RewardModule, 3),
     (PreferenceModule, 2)],
)  # fmt: skip
def test_members_and_streams_must_be_equal(module, streams):
    with pytest.raises(UserError, match=r"data.streams is .* and model.members .*: expected equal"):
        fit(module(), pairs(streams), steps=1)
