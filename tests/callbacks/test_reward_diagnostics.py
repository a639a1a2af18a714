"""Reward diagnostics: of a real, tiny reward model in fit, validate and test, and of rows that samplers repeat."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import RewardDiagnostics
from callbacks.reward_diagnostics import scalars
from callbacks.reward_rows import PairRow, pairs_of, seen
from callbacks.reward_rows import pair_rows as rows_of
from lit_rlhf import plots, plots_reward, records
from lit_rlhf.data import PreferenceData
from lit_rlhf.functional.aggregation import WorstCase
from lit_rlhf.functional.pair_stats import summarise
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.modules import RewardEnsembleModule, RewardModule
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.types import PreferenceBatch, Sampling, Scores, Sequences, Share, UserError

TAGS = {
    "accuracy_low", "accuracy_high", "accuracy_macro", "length_accuracy", "ece", "brier", "length_pearson",
    "length_spearman", "length_slope", "prefers_longer", "policy_shift", "policy_auroc",
}  # fmt: skip
WORDS = ("the cat sat", "a dog ran", "i think so", "no", "please tell me more", "a bird sang under the tree")


def rows():
    """Forty pairs over ten prompts in two categories; one answer of each pair is good."""
    return [
        {
            "prompt": f"tell me about {WORDS[i % 5]} {'and a cat' if i % 10 < 5 else 'and a dog'}",
            "chosen": f"{WORDS[i % 6]} good", "rejected": f"{WORDS[(i + 2) % 6]} bad",
            "category": "cats" if i % 10 < 5 else "dogs",
        }
        for i in range(40)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(path)


def trainer(folder, callback, **options):
    return Trainer(
        accelerator="cpu", logger=TensorBoardLogger(folder, name="rm", version=0), callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, log_every_n_steps=1, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_llama_path, data_file):
    folder = tmp_path_factory.mktemp("fit")
    seed_everything(0, verbose=False)
    module = RewardModule(model_name_or_path=tiny_llama_path, optimizer=Optimizer(lr=3e-3))
    data = PreferenceData(
        tokenizer=tiny_llama_path, train=data_file, validation=data_file, test=data_file, batch_size=8
    )
    callback = RewardDiagnostics(policy=tiny_llama_path, n_prompts=6, sampling=Sampling(max_new_tokens=5), batch_size=4)
    runner = trainer(folder, callback, max_epochs=2)
    runner.fit(module, data)
    return SimpleNamespace(trainer=runner, module=module, data=data, folder=folder / "rm" / "version_0")


def test_every_validation_leaves_a_record_and_tags(fitted):
    found = records.read(fitted.folder / records.REWARD)
    assert [(r["split"], r["step"], r["method"], r["label"], r["seed"]) for r in found[:2]] == [
        ("validation", 5, "reward", "rm", 0), ("validation", 10, "reward", "rm", 0),
    ]  # fmt: skip
    logged = fitted.trainer.callback_metrics
    assert {f"val/reward/{name}" for name in TAGS} <= logged.keys()
    last = found[1]
    assert logged["val/reward/accuracy"] == pytest.approx(last["accuracy"]["value"], abs=1e-6)
    assert logged["val/reward/accuracy/cats"] == pytest.approx(
        last["categories"]["cats"]["accuracy"]["value"], abs=1e-6
    )
    assert (last["accuracy"]["n"], last["accuracy"]["clusters"]) == (40, 10)
    assert last["policy"]["samples"] == 6
    assert last["experts"] == {}
    from lit_rlhf.report import _events, _scalars

    assert {f"val/reward/{name}" for name in TAGS} <= _scalars(fitted.folder).keys()
    (events,) = fitted.folder.glob("events*")
    assert len(list(_events(events))) > 40
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = EventAccumulator(str(fitted.folder)).Reload().Tags()["images"]
    assert set(images) == {"val/reward/reliability", "val/reward/length", "val/reward/categories"}


def test_the_numbers_are_those_of_the_scores(fitted):
    """The record says what the module's own `score` says of the rows, taken one by one."""
    last = records.read(fitted.folder / records.REWARD)[1]
    given = rows()
    prompts = [row["prompt"] for row in given]
    chosen, rejected = (fitted.module.score(prompts, [r[k] for r in given]).total for k in ("chosen", "rejected"))
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    assert last["accuracy"]["value"] == pytest.approx(right.mean().item(), abs=1e-6)
    assert last["brier"] == pytest.approx((1 - torch.sigmoid(chosen - rejected)).square().mean().item(), abs=1e-5)
    lengths = [[len(row[k].split()) + 1 for row in given] for k in ("chosen", "rejected")]
    rule = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(*lengths, strict=True)])
    assert last["length_accuracy"]["value"] == pytest.approx(rule, abs=1e-12)


def ensemble(path, **options):
    lora = LoRA(r=2, alpha=4)
    return RewardEnsembleModule(model_name_or_path=path, members=3, lora=lora, optimizer=Optimizer(lr=3e-2), **options)


def test_an_ensembles_record_is_on_the_scale_of_its_own_validation(tmp_path, tiny_llama_path, data_file):
    """The callback comes before the module's hook: every record still says what the module says once it is over.

    Calibration is of the members' mean probability by raw scores, whatever makes the total.
    """
    seed_everything(0, verbose=False)
    module = ensemble(tiny_llama_path, aggregator=WorstCase())
    data = PreferenceData(
        tokenizer=tiny_llama_path, train=data_file, validation=data_file, batch_size=8, streams=3, joiner=" "
    )
    given, found = rows(), []
    prompts = [row["prompt"] for row in given]

    class Told(Callback):
        def on_validation_end(self, trainer, pl_module):
            both = [module.score(prompts, [r[k] for r in given]) for k in ("chosen", "rejected")]
            margin = (both[0].members - both[1].members) * module.reward_model.score_std
            brier = (1 - torch.sigmoid(margin.double()).mean(1)).square().mean().item()
            found.append(((both[0].total - both[1].total).mean().item(), brier))

    runner = trainer(tmp_path, RewardDiagnostics(), max_epochs=2)
    runner.callbacks.append(Told())
    runner.fit(module, data)
    kept = records.read(tmp_path / "rm" / "version_0" / records.REWARD)
    assert len(found) == len(kept) == 2
    for record, (margin, brier) in zip(kept, found, strict=True):
        assert record["margin"] == pytest.approx(margin, abs=1e-4)
        assert record["brier"] == pytest.approx(brier, abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-2)
    assert runner.callback_metrics["val/reward/accuracy"] == pytest.approx(kept[1]["accuracy"]["value"], abs=1e-6)


def test_neither_validate_nor_test_moves_the_scale(fitted, tmp_path):
    before = [buffer.clone() for buffer in fitted.module.buffers()]
    scale = fitted.module.reward_model.score_mean.item(), fitted.module.reward_model.score_std.item()
    fitted.module.reward_model.set_scale(3.0, 7.0)
    try:
        for stage in ("validate", "test"):
            runner = trainer(tmp_path / stage, RewardDiagnostics())
            getattr(runner, stage)(fitted.module, fitted.data, verbose=False)
            prefix = {"validate": "val", "test": "test"}[stage]
            assert {n for n in runner.callback_metrics if n.endswith("reward/std")} == {f"{prefix}/reward/std"}
            assert fitted.module.reward_model.score_mean == 3
            assert fitted.module.reward_model.score_std == 7
    finally:
        fitted.module.reward_model.set_scale(*scale)
    for value, old in zip(fitted.module.buffers(), before, strict=True):
        assert torch.equal(value, old)


def test_validate_and_test_measure_too(fitted, tmp_path):
    callback = RewardDiagnostics()
    runner = trainer(tmp_path, callback)
    runner.validate(fitted.module, fitted.data, verbose=False)
    runner.test(fitted.module, fitted.data, verbose=False)
    (first, second) = records.read(tmp_path / "rm" / "version_0" / records.REWARD)
    fit = records.read(fitted.folder / records.REWARD)[1]
    assert (first["split"], second["split"]) == ("validation", "test")
    assert first["policy"] is None
    assert "test/reward/ece" in runner.callback_metrics
    for name in ("accuracy", "ece", "brier"):
        assert first[name] == second[name] == fit[name]


def test_it_changes_nothing_in_training(tmp_path, tiny_llama_path, data_file):
    ends = []
    for callbacks in ([], [RewardDiagnostics(tiny_llama_path, 4, sampling=Sampling(max_new_tokens=4))]):
        seed_everything(1, verbose=False)
        module = RewardModule(
            model_name_or_path=tiny_llama_path, lora=LoRA(r=2, dropout=0.5), optimizer=Optimizer(lr=1e-2)
        )
        data = PreferenceData(tokenizer=tiny_llama_path, train=data_file, validation=data_file, batch_size=8)
        runner = Trainer(
            accelerator="cpu", max_steps=4, val_check_interval=2, logger=False, callbacks=callbacks,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )  # fmt: skip
        runner.fit(module, data)
        ends.append({name: p.detach().clone() for name, p in module.named_parameters()})
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_samples_come_from_a_file_too(fitted, tmp_path):
    """The responses of the data as samples lie where the data lie."""
    samples = tmp_path / "samples.jsonl"
    given = [{"prompt": r["prompt"], "response": r[k], "step": 3} for r in rows() for k in ("chosen", "rejected")]
    records.append(samples, [{"prompt": "no", "response": "no", "step": 0}, *given])
    runner = trainer(tmp_path, RewardDiagnostics(str(samples), 1000))
    runner.validate(fitted.module, fitted.data, verbose=False)
    (record,) = records.read(tmp_path / "rm" / "version_0" / records.REWARD)
    assert record["policy"]["samples"] == 80
    assert record["policy"]["shift"] == pytest.approx(0, abs=1e-5)
    assert record["policy"]["auroc"] == pytest.approx(0.5, abs=1e-3)
    assert record["policy"]["prompts"] == 10


@pytest.mark.parametrize(
    ("content", "message"), [("", "no samples"), ('{"prompt": "a"}\n', "row 1: expected `prompt` and `response`")]
)
def test_a_bad_file_of_samples_is_told(fitted, tmp_path, content, message):
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, RewardDiagnostics(str(tmp_path / "s.jsonl"))).validate(fitted.module, fitted.data)


def test_resuming_drops_what_will_be_lived_again(fitted, tmp_path):
    """The run is taken up at step 10, its last; what a lost continuation wrote behind that goes."""
    fitted.trainer.save_checkpoint(tmp_path / "it.ckpt")
    file = tmp_path / "rm" / "version_0" / records.REWARD
    file.parent.mkdir(parents=True)
    records.append(file, [{"step": s, "lost": True} for s in (5, 10, 12, 15)])
    module = RewardModule(model_name_or_path=fitted.module.model_name_or_path, optimizer=Optimizer(lr=3e-3))
    runner = trainer(tmp_path, RewardDiagnostics(), max_epochs=3)
    runner.fit(module, fitted.data, ckpt_path=tmp_path / "it.ckpt")
    assert [(r["step"], r.get("lost")) for r in records.read(file)] == [(5, True), (10, True), (15, None)]


def batch(index, categories=(), prompts=None):
    """Pairs of one prompt token, then one response token for chosen and two for rejected."""
    n = len(index)
    prompt = torch.tensor([*(prompts or index)] * 2)
    ids = torch.stack([prompt, torch.full((2 * n,), 7), torch.full((2 * n,), 8)], 1)
    attention = torch.ones(2 * n, 3, dtype=torch.bool)
    attention[:n, 2] = False
    response = attention.clone()
    response[:, 0] = False
    share = Share(torch.tensor(1.0), torch.tensor(1.0))
    index = torch.tensor(index)
    return PreferenceBatch(
        Sequences(ids, attention, response), torch.ones(n), torch.zeros(n), share, index, tuple(categories)
    )


def pair_rows(batch, scores):
    return rows_of(seen(batch, {"scores": scores}))


def test_rows_of_a_batch():
    found = pair_rows(batch([4, 2], ["x", None], prompts=[9, 9]), Scores(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert [r._replace(prompt=0) for r in found] == [
        PairRow(4, 0, 1, 1, 2, "x", 1, 3, -2, ()), PairRow(2, 0, 1, 1, 2, None, 2, 4, -2, ()),
    ]  # fmt: skip
    assert found[0].prompt == found[1].prompt
    other = pair_rows(batch([4, 2]), Scores(torch.zeros(4)))
    assert other[0].prompt != other[1].prompt


def test_logits_of_a_step_count_in_place_of_margins_and_scores_may_come_later():
    outputs = {"scores": lambda: Scores(torch.tensor([1.0, 2.0, 3.0, 4.0])), "logits": torch.tensor([0.5, -0.25])}
    found = pairs_of(rows_of(seen(batch([4, 2]), outputs)), [], 1)
    assert (found.margin.tolist(), found.logits.tolist()) == ([-2, -2], [-0.25, 0.5])  # by row
    with pytest.raises(UserError, match=r"logits of shape \(1,\); expected one for each of 2 pairs"):
        rows_of(seen(batch([4, 2]), outputs | {"logits": torch.zeros(1)}))


def test_rows_that_a_sampler_repeated_count_once():
    """Five rows over two processes: one has three, the other two and a repeated one."""
    scores = torch.tensor([1.0, 2.0, -1.0, 3.0, 0.5])
    parts = [[0, 2, 4], [1, 3, 1]]
    seen = [row for part in parts for row in pair_rows(batch(part), Scores(torch.cat([scores[part], torch.zeros(3)])))]
    whole = pair_rows(batch([0, 1, 2, 3, 4]), Scores(torch.cat([scores, torch.zeros(5)])))
    assert summarise(pairs_of(seen, [], 1)) == summarise(pairs_of(whole, [], 1))
    assert summarise(pairs_of(seen, [], 1))["accuracy"]["value"] == 0.8


def test_experts_are_counted_and_logged():
    gates = {"gate/poems": torch.tensor([1.0, 0.0, 1.0, 0.0]), "gate/sums": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    scores = Scores(torch.tensor([1.0, 2.0, 0.0, 0.0]), parts={"other": torch.zeros(4), **gates})
    seen = pair_rows(batch([0, 1], ["x", "y"]), scores)
    record = summarise(pairs_of(seen, ["poems", "sums"], 1)) | {"policy": None}
    assert record["experts"] == {"x": {"poems": 1, "sums": 0}, "y": {"poems": 0, "sums": 1}}
    tags = scalars(record)
    assert (tags["moe/usage/poems"], tags["moe/usage/sums"]) == (0.5, 0.5)


def test_the_figures_draw_what_the_record_says():
    seen = pair_rows(batch([0, 1, 2], ["a <b>", "a <b>", "c" * 40]), Scores(torch.tensor([1.0, 2, -1, 0, 0, 0])))
    record = summarise(pairs_of(seen, [], 1))
    lines = plots_reward.reliability_figure(record).axes[0].lines
    drawn = [b["confidence"] for b in record["reliability"]]
    assert any(list(line.get_xdata()) == drawn for line in lines)
    axes = plots_reward.category_figure(record).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0, 1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c" * 17 + "…", "a <b>"]
    for figure in (plots_reward.length_figure(record), plots_reward.category_figure(record)):
        assert plots.pixels(figure).std() > 1


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "got NoneType"),
        (torch.zeros(4), "got Tensor"),
        (Scores(torch.zeros(2)), r"scores of shape \(2,\)"),
        (Scores(torch.tensor([0.0, 0.0, 0.0, torch.nan])), "score of pair 1 is nan"),
    ],
)
def test_scores_that_are_none_are_told(scores, message):
    with pytest.raises(UserError, match=message):
        pair_rows(batch([0, 1]), scores)


@pytest.mark.parametrize("name", ["n_prompts", "batch_size", "bins"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=name):
        RewardDiagnostics(**{name: 0})


def test_a_module_that_returns_nothing_is_told(tmp_path, fitted):
    class Silent(LightningModule):
        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(UserError, match="RewardDiagnostics needs a module"):
        trainer(tmp_path, RewardDiagnostics()).validate(Silent(), fitted.data)
