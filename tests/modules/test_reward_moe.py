"""DMoERM in fits: what each phase may move, what it leaves on disk, going on after a kill, and the ablations."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from callbacks import RewardDiagnostics
from lit_rlhf.data import CategoryData, PhaseData
from lit_rlhf.functional.aggregation import WorstCase
from lit_rlhf.functional.constrained import AtLeast
from lit_rlhf.functional.control import FixedKL
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.models.moe import MoE
from lit_rlhf.models.moe_scorer import MoERewardModel
from lit_rlhf.models.router import Router
from lit_rlhf.modules import RewardMoEModule, RouterModule
from lit_rlhf.modules.moe_metrics import MoEMetrics
from lit_rlhf.modules.objective import WeightedReward
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.modules.router import RouterMetrics
from lit_rlhf.types import CategoryBatch, ExpertBatch, Sequences, Share, UserError
from tests.modules.ppo_parts import ready

OPTIMIZER = Optimizer(lr=1e-2, warmup_ratio=0.5, weight_decay=0.1)
EPOCHS = {"router": 1, "task": 1, "capability": 1, "mixture": 2}


def rows(n=48):
    """Two categories with two and three points; which answer is better depends on the category."""
    rng = random.Random(0)
    found = []
    for i in range(n):
        kind = ("ask", "tell")[i % 2]
        prompt = " ".join([{"ask": "who", "tell": "please"}[kind], *rng.sample(WORDS, 2)])
        names = {"ask": ["wit", "calm"], "tell": ["wit", "calm", "art"]}[kind]
        good, bad = ("the cat sat", "no rain") if kind == "ask" else ("no rain", "the cat sat")
        aspects = {name: 1 if (k + i // 2) % 3 else -1 for k, name in enumerate(names)}
        found.append({"prompt": prompt, "chosen": good, "rejected": bad, "category": kind, "aspects": aspects})
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(path)


def module_of(path, **options):
    defaults = {"optimizer": OPTIMIZER, "lora": LoRA(r=2, dropout=0.1)}
    return RewardMoEModule(model_name_or_path=path, **(defaults | options))


def data_of(path, source, **options):
    defaults = {"epochs": EPOCHS, "batch_size": 8, "max_length": 24, "validation_fraction": 0.2}
    return PhaseData(path, train=source, **(defaults | options))


def fit(module, data, *callbacks, folder=None, ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=TensorBoardLogger(folder, name="run", version=0) if folder else False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def hashed(tensors) -> str:
    seen = sha256()
    for tensor in tensors:
        seen.update(tensor.detach().contiguous().numpy().tobytes())
    return seen.hexdigest()


def parts(module) -> dict[str, str]:
    """A hash of every part that phases move or leave alone."""
    moe: MoE = module.moe
    shared = moe.form == "shared"
    base = [p for name, p in moe.bodies.named_parameters() if not name.endswith((".A", ".B"))]
    count = len(moe.categories) if shared else 0
    return {
        "base": hashed(base),
        "categories": hashed(p[:count] for p in moe.experts()),
        "points": hashed(p[count:] for p in moe.experts()),
        "task_heads": hashed(moe.task_heads.parameters()),
        "point_heads": hashed(moe.point_heads.parameters()),
        "mixtures": hashed(moe.mixtures.parameters()),
        "router": hashed(module.router.parameters()) if module.router is not None else "",
    }


class Watch(Callback):
    """Hashes at the start of each epoch and at the end; whether dropout was on in every training step; losses."""

    def __init__(self):
        self.epochs, self.training, self.losses, self.lrs, self.phases = [], [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append((trainer.datamodule.phase(trainer.current_epoch), parts(pl_module)))

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.training.append(all(m.training for m in pl_module.modules() if isinstance(m, nn.Dropout)))
        self.phases.append(pl_module.current_phase)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.losses.append(trainer.callback_metrics["loss"].item())
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        self.epochs.append(("end", parts(pl_module)))

    def moved(self) -> list[tuple[str, set[str]]]:
        """Each epoch's phase and the parts that changed in it."""
        return [
            (phase, {name for name in before if before[name] != after[name]})
            for (phase, before), (_, after) in zip(self.epochs, self.epochs[1:], strict=False)
        ]


@pytest.fixture(scope="module", params=["shared", "backbones"])
def fitted(request, tiny_llama_path, source, tmp_path_factory):
    """One fit through all phases."""
    folder, watch = tmp_path_factory.mktemp("moe"), Watch()
    module, data = module_of(tiny_llama_path, form=request.param), data_of(tiny_llama_path, source)
    trainer = fit(module, data, watch, RewardDiagnostics(), folder=folder)
    return module, data, trainer, watch, folder / "run" / "version_0"


def test_each_phase_moves_its_own_part_and_no_bit_else(fitted):
    module, _, _, watch, _ = fitted
    own = {"categories"} if module.form == "shared" else {"base"}
    expected = [
        ("router", {"router"}),
        ("task", own | {"task_heads"}),
        ("capability", {"points", "point_heads"}),
        ("mixture", {"mixtures"}),
        ("mixture", {"mixtures"}),
    ]
    assert watch.moved() == expected


def test_dropout_is_on_in_every_training_step_though_validations_came_between(fitted):
    module, _, _, watch, _ = fitted
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())
    assert watch.training
    assert all(watch.training)


def test_the_modules_train_switch_is_torchs_own():
    assert RewardMoEModule.train is nn.Module.train
    assert MoE.train is nn.Module.train


def test_every_phase_has_its_own_warm_up_and_rate(tiny_llama_path, source):
    watch = Watch()
    fit(module_of(tiny_llama_path, lrs={"capability": 0.5}), data_of(tiny_llama_path, source), watch)
    for phase, peak in (("router", 0.01), ("task", 0.01), ("capability", 0.5), ("mixture", 0.01)):
        # logged after the schedule's tick, so the last one belongs to what follows
        rates = [lr for lr, own in zip(watch.lrs, watch.phases, strict=True) if own == phase][:-1]
        steps = len(rates) + 1
        warm = round(0.5 * steps)
        assert rates == pytest.approx([peak * min(1, (i + 1) / warm) for i in range(len(rates))])


def test_each_phase_leaves_a_folder_that_scores(fitted, tiny_llama_path):
    module, _, _, _, folder = fitted
    done = []
    for phase in EPOCHS:
        done.append(phase)
        described = json.loads((folder / "phases" / phase / "reward.json").read_text())
        assert described["phases"] == done
        assert described["inner"] == {"capability": "mean", "mixture": "mixture"}.get(phase, "none")
        scorer = MoERewardModel(str(folder / "phases" / phase))
        assert scorer.score(["who cat dog"], ["the cat sat"]).total.isfinite().all()
    mine = module.score(["who cat dog", "please no cat"], ["the cat sat", "no rain"])
    theirs = scorer.score(["who cat dog", "please no cat"], ["the cat sat", "no rain"])
    torch.testing.assert_close(theirs.total, mine.total, rtol=0, atol=1e-5)
    for name in ("art", "calm", "wit", "spread"):
        torch.testing.assert_close(theirs.parts[name], mine.parts[name], rtol=0, atol=1e-5, equal_nan=True)


def test_held_out_scores_have_mean_0_and_spread_1_in_every_category(fitted):
    module, data, _, _, _ = fitted
    scores = {"ask": [], "tell": []}
    for item in data.examples("validation").items:
        for answer in item.row.answers:
            module.routing = "oracle"
            found = module.score([item.row.prompt], [answer], [item.row.category]).total.item()
            scores[item.row.category].append(found)
    module.routing = "router"
    for category in scores.values():
        assert np.mean(category) == pytest.approx(0, abs=1e-3)
        assert np.std(category) == pytest.approx(1, abs=1e-3)


def test_what_was_learned_and_logged(fitted):
    _, _, trainer, watch, _ = fitted
    logged = trainer.callback_metrics
    assert watch.losses[-1] < math.log(2)
    assert logged["val/reward/accuracy"] == 1.0  # a rule of two words
    for name in (
        "reward/accuracy", "reward/margin", "mixture/reward/margin", "val/moe/router_accuracy",
        "val/moe/accuracy/ask", "val/moe/point_accuracy/tell/art",
    ):  # fmt: skip
        assert name in logged, name
    assert "val/moe/point_accuracy/ask/art" not in logged


def test_the_record_of_a_fit_tells_which_experts_were_used_and_how_the_logits_are_calibrated(fitted):
    """The router's own choices, and sigmoids of raw margins by the chosen experts; both computed here anew."""
    module, data, trainer, _, folder = fitted
    last = [json.loads(line) for line in (folder / "reward.jsonl").read_text().splitlines()][-1]
    items = data.examples("validation").items
    routed = Counter(Router(str(folder / "phases" / "mixture" / "router")).route([i.row.prompt for i in items]))
    listed = Counter(item.row.category for item in items)
    assert len(listed) == 2
    assert last["experts"].keys() == listed.keys()
    for name in ("ask", "tell"):
        used = sum(row[name] for row in last["experts"].values())
        assert used == pytest.approx(routed[name])
        assert trainer.callback_metrics[f"val/moe/usage/{name}"].item() == pytest.approx(routed[name] / len(items))
    squares = []
    for item in items:
        prompt, (c,) = item.row.prompt, [{"ask": 0, "tell": 1}[n] for n in module_choice(module, [item.row.prompt])]
        both = module.score([prompt] * 2, list(item.row.answers)).total * module.moe.score_std[2, c]
        squares.append(1 / (1 + math.exp(both[0] - both[1])) ** 2)
    assert last["brier"] == pytest.approx(np.mean(squares), abs=1e-5)


def module_choice(module, prompts):
    gate = module.details(prompts, ["no"] * len(prompts)).gate
    return [module.moe.categories[c] for c in gate.argmax(-1).tolist()]


class Outputs(Callback):
    """What the validation steps returned, read when all were done."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.kept = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.kept.append((outputs, batch.label))

    def on_validation_epoch_end(self, trainer, pl_module):
        found = [(outputs["scores"](), outputs["logits"]) for outputs, _ in self.kept]
        self.scores = torch.cat([scores.total.view(2, -1) for scores, _ in found], 1)
        gates = [torch.stack([scores.parts[f"gate/{name}"] for name in ("ask", "tell")], -1) for scores, _ in found]
        self.gate = torch.cat([gate.chunk(2)[0] for gate in gates])
        self.logits = torch.cat([logits for _, logits in found])


@pytest.mark.parametrize("routing", ["router", "soft", "oracle"])
def test_a_validation_measures_the_scores_that_are_used(fitted, tiny_llama_path, source, routing):
    """Against `score`, with a router that is mostly wrong: its rows are exchanged."""
    module, data, *_ = fitted
    outputs = Outputs()
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[outputs], enable_progress_bar=False)
    rows = [item.row for item in data.examples("validation").items]
    prompts, listed = [row.prompt for row in rows], [row.category for row in rows]
    before, scale = module.router.head.weight.detach().clone(), module.moe.score_mean.clone()
    try:
        with torch.no_grad():
            module.router.head.weight.copy_(0.1 * before.flip(0))
        module.routing = routing
        (logged,) = trainer.validate(module, data, verbose=False)
        found = [module.details(prompts, [row.answers[side] for row in rows], listed) for side in (0, 1)]
    finally:
        module.routing = "router"
        with torch.no_grad():
            module.router.head.weight.copy_(before)
    assert torch.equal(module.moe.score_mean, scale)  # only a fit sets it
    expected = torch.stack([one.total for one in found])
    torch.testing.assert_close(outputs.scores, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.gate, found[0].gate, rtol=0, atol=1e-5)
    assert logged["val/reward/accuracy"] == 1.0
    if routing == "oracle":
        assert "val/reward/accuracy_routed" not in logged
        assert outputs.gate.max(-1).values.min() == 1
    else:
        right = (expected[0] > expected[1]).float().mean().item()
        assert right < 1.0
        assert logged["val/reward/accuracy_routed"] == pytest.approx(right)
        assert (outputs.gate.max(-1).values.min() < 0.95) == (routing == "soft")
    assert logged["val/moe/router_accuracy"] < 1.0


def test_states_are_forgotten_after_a_fit(fitted):
    module, *_ = fitted
    assert (module._states, module._held_out_states) == ({}, {})


def test_the_states_of_the_mixture_are_computed_once(tiny_llama_path, source, monkeypatch):
    module = module_of(tiny_llama_path, routing="oracle")
    data = data_of(tiny_llama_path, source, epochs=EPOCHS | {"mixture": 3})
    calls, modes = [], []
    states = MoE.states

    def counted(self, sequences, category):
        if module.current_phase == "mixture":
            calls.append(len(category))
            modes.append((self.training, torch.is_grad_enabled()))
        return states(self, sequences, category)

    monkeypatch.setattr(MoE, "states", counted)
    fit(module, data)
    most = 2 * (len(data.items["mixture"]) + len(data.examples("validation").items))
    assert sum(calls) == most
    assert set(modes) == {(False, False)}


# -- going on ---------------------------------------------------------------------------------------------------------


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt

    def on_exception(self, trainer, pl_module, exception):
        raise exception


@pytest.mark.parametrize("stop", [3, 5, 6, 11, 17])
def test_resuming_inside_any_phase_equals_not_having_stopped(tiny_llama_path, source, tmp_path, stop):
    def make():
        torch.manual_seed(1)
        return module_of(tiny_llama_path, lora=LoRA(r=2)), data_of(tiny_llama_path, source)

    whole, second = Watch(), Watch()
    module, data = make()
    fit(module, data, whole)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    with pytest.raises(KeyboardInterrupt):
        fit(*make(), saver, Kill(stop + 1))
    resumed, data = make()
    fit(resumed, data, second, saver, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert second.phases == whole.phases[stop:]
    assert second.losses == pytest.approx(whole.losses[stop:], abs=1e-5)
    assert resumed.done == list(EPOCHS)
    for a, b in zip(module.moe.parameters(), resumed.moe.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_checkpoint_of_every_phase_reloads_with_the_results_of_all(fitted, tmp_path):
    module, _, trainer, _, _ = fitted
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    again = RewardMoEModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert again.trained_inner == "mixture"
    one, other = (m.score(["who cat dog"], ["the cat sat"]) for m in (module, again))
    torch.testing.assert_close(one.total, other.total)
    if module.form == "shared":
        kept = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
        assert not module.moe.frozen() & {name.removeprefix("moe.") for name in kept}


@pytest.mark.parametrize("form", ["shared", "backbones"])
def test_phases_can_run_one_by_one_from_what_the_one_before_left(tiny_llama_path, source, tmp_path, form):
    start, before = None, None
    for phase in ("task", "capability", "mixture"):
        watch = Watch()
        module = module_of(tiny_llama_path, phase=phase, start=start, form=form)
        trainer = fit(module, data_of(tiny_llama_path, source), watch, folder=tmp_path / phase)
        assert {own for own, _ in watch.moved()} == {phase}
        if before is not None:
            kept = {"base", "categories", "task_heads"} | ({"points", "point_heads"} if phase == "mixture" else set())
            for name in kept:
                assert watch.epochs[0][1][name] == before[name], (phase, name)
        start, before = str(tmp_path / phase / "run" / "version_0" / "phases" / phase), parts(module)
    assert module.done == ["task", "capability", "mixture"]
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    shutil.rmtree(start)
    shutil.rmtree(tmp_path / "capability")
    again = RewardMoEModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert parts(again) == before


def start_of(folder, phase="mixture") -> str:
    return str(folder / "phases" / phase)


@pytest.mark.parametrize(
    ("phase", "left", "inner"),
    [("task", ["router", "task"], "none"), ("router", ["task", "capability", "mixture", "router"], "mixture")],
)
def test_a_phase_that_begins_anew_takes_those_that_stand_on_it_away(
    fitted, tiny_llama_path, source, tmp_path, phase, left, inner
):
    first, *_, folder = fitted
    module = module_of(tiny_llama_path, phase=phase, start=start_of(folder), form=first.form)
    fit(module, data_of(tiny_llama_path, source), folder=tmp_path)
    assert module.done == left
    again = tmp_path / "run" / "version_0" / "phases" / phase
    described = json.loads((again / "reward.json").read_text())
    assert (described["phases"], described["inner"]) == (left, inner)
    assert (again / "category-0" / "mixture.safetensors").exists() == (inner == "mixture")


@pytest.mark.parametrize(("phase", "before"), [("capability", "task"), ("mixture", "capability")])
def test_a_phase_alone_needs_what_it_stands_on(fitted, tiny_llama_path, source, phase, before):
    first, *_, folder = fitted
    for start in (None, start_of(folder, "router")):
        module = module_of(tiny_llama_path, phase=phase, start=start, form=first.form)
        with pytest.raises(
            UserError, match=rf"phase '{phase}' stands on phase '{before}'.*data.epochs.{before} to be 0"
        ):
            fit(module, data_of(tiny_llama_path, source))


def test_a_start_that_is_trained_over_lends_no_score(fitted, tiny_llama_path, source):
    first, *_, folder = fitted
    module = module_of(tiny_llama_path, start=start_of(folder), form=first.form)
    with pytest.raises(UserError, match="needs phase 'mixture'"):
        fit(module, data_of(tiny_llama_path, source, epochs={"router": 0, "task": 1, "capability": 0, "mixture": 0}))


def test_without_validation_an_export_warns_and_soft_routing_is_refused(tiny_llama_path, source, tmp_path):
    epochs = {"router": 0, "task": 1, "capability": 0, "mixture": 0}
    module = module_of(tiny_llama_path, inner="none", routing="oracle")
    fit(module, data_of(tiny_llama_path, source, epochs=epochs), limit_val_batches=0)
    with pytest.warns(UserWarning, match="on scales of their own"):
        module.export(str(tmp_path / "out"))
    for options, data in (({"limit_val_batches": 0}, {}), ({}, {"validation_fraction": 0.0})):
        soft = module_of(tiny_llama_path, inner="none", routing="soft")
        with pytest.raises(UserError, match="routing 'soft' adds up"):
            fit(soft, data_of(tiny_llama_path, source, epochs=epochs, **data), **options)


# -- ablations and routing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "inner", "moved"),
    [
        ({"inner": "none"}, {"capability": 0, "mixture": 0}, "none", {"categories", "task_heads"}),
        ({"inner": "mean"}, {"mixture": 0}, "mean", {"categories", "task_heads", "points", "point_heads"}),
        ({}, {"task": 0}, "mixture", {"points", "point_heads", "mixtures"}),
        ({}, {"capability": 0}, "mixture", {"categories", "task_heads", "points", "mixtures"}),
        ({"routing": "soft"}, {}, "mixture", {"categories", "task_heads", "points", "point_heads", "mixtures"}),
    ],
    ids=["no inner", "mean", "skip phase 1", "skip phase 2", "soft"],
)
def test_ablations_are_words_of_the_config(tiny_llama_path, source, model, data, inner, moved):
    watch = Watch()
    module = module_of(tiny_llama_path, **model)
    fit(module, data_of(tiny_llama_path, source, epochs=EPOCHS | data), watch)
    assert module.trained_inner == inner
    assert set().union(*(names for _, names in watch.moved())) == moved | {"router"}
    assert module.score(["who cat dog"], ["the cat sat"]).total.isfinite().all()


def test_without_an_outer_layer_there_is_one_category_and_no_router(tiny_llama_path, source, tmp_folder):
    module = module_of(tiny_llama_path)
    fit(module, data_of(tiny_llama_path, source, outer="one"))
    assert module.router is None
    assert module.done == ["task", "capability", "mixture"]
    module.export(str(tmp_folder))
    found = MoERewardModel(str(tmp_folder)).score(["who cat dog"], ["the cat sat"])
    torch.testing.assert_close(found.total, module.score(["who cat dog"], ["the cat sat"]).total)
    assert set(found.parts) == {"art", "calm", "wit", "spread"}


def test_a_score_that_no_phase_makes_is_refused(tiny_llama_path, source):
    with pytest.raises(UserError, match="needs phase 'mixture'"):
        fit(module_of(tiny_llama_path), data_of(tiny_llama_path, source, epochs=EPOCHS | {"mixture": 0}))
    with pytest.raises(UserError, match="needs phase 'capability'"):
        fit(module_of(tiny_llama_path, inner="mean"), data_of(tiny_llama_path, source, epochs={"capability": 0}))


def test_a_router_of_ones_own_routes_the_rows_without_a_category(tiny_llama_path, source, tmp_path):
    router = RouterModule(model_name_or_path=tiny_llama_path, optimizer=Optimizer(lr=1e-2))
    questions = CategoryData(tiny_llama_path, train=source, batch_size=8, max_length=24)
    trainer = fit(router, questions, max_steps=20)
    assert trainer.callback_metrics["val/router/accuracy"] == 1.0
    router.export(str(tmp_path / "router"))
    assert Router(str(tmp_path / "router")).route(["who ran", "please tell"]) == ["ask", "tell"]
    half = [row | ({} if i % 3 else {"category": None}) for i, row in enumerate(rows())]
    path = tmp_path / "half.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in half))
    module = module_of(tiny_llama_path, router=str(tmp_path / "router"))
    data = data_of(tiny_llama_path, str(path))
    fit(module, data)
    held_out = data.examples("validation").dropped["no category"]  # the router shall not be graded on its own choices
    assert (data.routed, held_out) == (16 - held_out, 16 - data.routed)
    assert min(data.routed, held_out) > 0
    assert module.done == ["task", "capability", "mixture"]
    for item in data.examples("train").items:
        assert item.row.category == {"who": "ask", "please": "tell"}[item.row.prompt.split()[0]]
    assert exported(module, tmp_path / "out").description["router"] == "router"


def exported(module, folder) -> MoERewardModel:
    module.export(str(folder))
    return MoERewardModel(str(folder))


# -- losses and accuracies by hand ------------------------------------------------------------------------------------


def sequences(n):
    ids = torch.randint(4, 20, (n, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(n, 6, dtype=torch.bool)
    return Sequences(ids, mask, mask)


def batch_of(phase, category, weight, label=None, point=None, aspects=None):
    n = len(category)
    return ExpertBatch(
        phase=phase,
        sequences=sequences(2 * n),
        category=torch.tensor(category),
        point=torch.tensor(point or [-1] * n),
        weight=torch.tensor(weight),
        label=torch.tensor(label or [1.0] * n),
        divisor=torch.tensor(sum(weight)),
        index=torch.arange(n),
        aspects=torch.tensor(aspects or [[0, 0, 0]] * n),
    )


@pytest.fixture(scope="module")
def bare(tiny_llama_path):
    """A module without a trainer."""
    points = {"ask": ["calm", "wit"], "tell": ["art", "calm", "wit"]}
    module = RewardMoEModule(model_name_or_path=tiny_llama_path, lora=LoRA(r=2), points=points)
    module.configure_model()
    module.log_means = lambda *args: None
    module.log_dict = lambda *args, **options: None
    return module


def test_a_loss_is_the_mean_within_a_prompt_and_then_over_prompts(bare):
    batch = batch_of("task", [0, 0, 0, 1], [1 / 3, 1 / 3, 1 / 3, 1.0])  # three pairs of one prompt, one of another
    scores = bare.moe.task(batch.sequences, batch.category.repeat(2)).detach().double().numpy()
    losses = np.log1p(np.exp(-(scores[:4] - scores[4:])))
    expected = (losses[:3].mean() + losses[3]) / 2
    assert bare.training_step(batch, 0).item() == pytest.approx(expected, abs=1e-6)


def test_a_point_is_scored_by_its_own_expert_and_head(bare):
    with torch.no_grad():
        for head in bare.moe.point_heads:
            head.weight.add_(0.3 * torch.randn_like(head.weight))
    batch = batch_of("capability", [0, 1], [1.0, 1.0], point=[1, 2])
    found = bare.losses(batch)
    scores = bare.moe.point_scores(bare.moe.states(batch.sequences, batch.category.repeat(2)), batch.category.repeat(2))
    gaps = (scores[:2] - scores[2:]).detach().double().numpy()[[0, 1], [1, 2]]
    assert found.loss.tolist() == pytest.approx(np.log1p(np.exp(-gaps)).tolist(), abs=1e-6)
    assert found.metrics["reward/accuracy"].tolist() == (gaps > 0).astype(float).tolist()


def test_large_margins_have_finite_losses(bare):
    from lit_rlhf.functional.preference import bradley_terry

    margin = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry(margin, torch.zeros(2)).loss
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4]
    assert margin.grad.tolist() == [0.0, -1.0]


def test_a_routers_loss_takes_the_logits_as_they_are(tiny_llama_path):
    module = RouterModule(model_name_or_path=tiny_llama_path, categories=["ask", "tell"])
    module.configure_model()
    share = Share(torch.tensor(3.0), torch.tensor(3.0))
    batch = CategoryBatch(sequences(3), torch.tensor([0, 1, 1]), share, torch.arange(3))
    with torch.no_grad():
        module.router.head.weight.mul_(20)  # far from even: a softmax before the loss would show
    logits, loss = module.losses(batch)
    x = logits.detach().double().numpy()
    expected = np.log(np.exp(x).sum(1)) - x[range(3), [0, 1, 1]]
    assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


class Figures:
    """A logger's experiment that keeps pictures."""

    def __init__(self):
        self.found = {}

    def add_figure(self, name, figure, step):
        self.found[name] = figure


def test_confusions_are_counted_with_the_true_category_first():
    logged, figures = {}, Figures()
    module = SimpleNamespace(
        log=lambda name, value: logged.update({name: float(value)}),
        log_dict=lambda values: logged.update({name: float(value) for name, value in values.items()}),
        logger=SimpleNamespace(experiment=figures),
        trainer=SimpleNamespace(is_global_zero=True),
        global_step=0,
    )
    metrics = RouterMetrics(["ask", "tell"])
    metrics.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    metrics.update(torch.tensor([[0.0, 3.0], [-1.0, 3.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
    metrics.report(module, "val/")
    counts = {"ask/ask": 1, "ask/tell": 2, "tell/ask": 0, "tell/tell": 2}
    assert logged == {"val/accuracy": pytest.approx(0.6)} | {f"val/confusions/{k}": v for k, v in counts.items()}
    (axes,) = figures.found["val/confusions"].axes
    assert ("True" in axes.get_ylabel(), "Predicted" in axes.get_xlabel()) == (True, True)
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "1"), ((1, 0), "2"), ((0, 1), "0"), ((1, 1), "2"),
    }  # fmt: skip
    metrics.report(module, "again/")  # nothing was seen since
    assert not any(name.startswith("again") for name in logged)


def test_training_rows_are_routed_in_the_window_of_the_data(tiny_llama_path, monkeypatch):
    module = module_of(tiny_llama_path, router="somewhere")
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(encoder=SimpleNamespace(max_length=24)))
    assert module.route.__self__.max_length == 24


def test_a_pair_counts_as_right_when_the_better_answer_scores_higher_and_ties_count_half():
    metrics = MoEMetrics({"ask": ["calm", "wit"], "tell": ["art", "calm", "wit"]})
    batch = batch_of("held out", [0, 0, 1], [1.0] * 3, aspects=[[1, -1, 0], [1, 0, 0], [0, -1, 0]])
    raw = torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0, 5.0])  # right, tie, wrong
    nan = math.nan
    points = torch.tensor(
        [[1.0, 1.0, nan], [0.0, 0.0, nan], [0.0, 2.0, 0.0]] + [[0.0, 0.0, nan]] * 2 + [[0.0, 1.0, 0.0]]
    )
    metrics.update(batch, raw, points)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(
        {
            "moe/accuracy/ask": 0.75,
            "moe/accuracy/tell": 0.0,
            "moe/point_accuracy/ask/calm": 0.75,  # right, and a tie
            "moe/point_accuracy/ask/wit": 0.0,  # the label says rejected
            "moe/point_accuracy/tell/calm": 0.0,
        }
    )


def test_the_phases_folder_is_written_inside_the_run(fitted):
    *_, folder = fitted
    assert sorted(p.name for p in Path(folder, "phases").iterdir()) == sorted(EPOCHS)


def test_it_rewards_a_policy_alone_or_by_its_weakest_point(fitted, tiny_llama_path, tmp_path):
    """The mixture is the task, the worst capability point a constraint; both come from one folder."""
    _, _, _, _, folder = fitted
    path = str(folder / "phases" / "mixture")
    rewards = {"mixture": MoERewardModel(path, "oracle"), "weakest": MoERewardModel(path, "oracle", WorstCase())}
    ppo, optimizer, batch = ready(
        tiny_llama_path, tmp_path, rewards=rewards, objective=WeightedReward({"mixture": 1.0}),
        constraints=[AtLeast("weakest", 0.2)], units="raw", kl=FixedKL(0.0),
    )  # fmt: skip
    rollout = ppo.rollout(batch)
    experience, metrics = ppo.advantages(batch.index, rollout, ppo.score(rollout))
    alone = rewards["mixture"].score(rollout.prompts, rollout.responses, rollout.categories).total
    assert metrics["objective/scores"] == pytest.approx(alone.mean().item(), abs=1e-5)
    weakest = rewards["weakest"].score(rollout.prompts, rollout.responses, rollout.categories).total
    torch.testing.assert_close(experience.constraint_values[:, 0], weakest.float())
    assert alone.std() > 0
    before = [p.detach().clone() for p in ppo.policy.parameters()]
    ppo.update_policy(experience, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, ppo.policy.parameters(), strict=True))
