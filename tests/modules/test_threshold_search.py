"""A search for thresholds: the peak is found within the budget, and an interrupted search goes on as it would have."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from callbacks import GoldProbe
from lit_rlhf.functional.constrained import AtLeast, AtMost, Equal
from lit_rlhf.functional.control import FixedKL
from lit_rlhf.modules.objective import NegativeKL
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.modules.ppo_options import PPOOptions
from lit_rlhf.modules.ppo_search import ThresholdSearchModule
from lit_rlhf.modules.threshold_search import Search, ThresholdSearch
from lit_rlhf.types import Sampling, Scorer, Scores, UserError
from tests.modules.ppo_parts import Letters, experience_of, prompts

ROOT = Path(__file__).parent.parent.parent
START, PEAK = {"a": 0.0, "b": 10.0}, (1.3, 16.0)


class World:
    """Values move half of the way to the target in an update of 10 episodes; gold falls off around the peak."""

    def __init__(self, options, speed=0.5):
        self.search = Search(options, {"a": 0.5, "b": 12.0})
        self.values, self.rollouts, self.speed = list(START.values()), 0, speed
        self.search.aim(START, 0, 0)
        self.trail = [self.search.target]

    def update(self):
        self.rollouts += 10
        target = self.search.target
        self.values = [v + self.speed * (t - v) for v, t in zip(self.values, target, strict=True)]
        distances = [abs(v - t) / abs(t - s) for v, t, s in zip(self.values, target, START.values(), strict=True)]
        arrived = max(distances) <= self.search.options.tolerance
        if self.search.ripe(self.rollouts, 10, arrived=arrived):
            self.search.record(self.gold(), dict(zip(START, self.values, strict=True)), arrived=arrived)
            self.search.aim(START, self.rollouts, 10)
            self.trail.append(self.search.target)

    def gold(self):
        (a, b), (x, y) = self.values, PEAK
        return -((a - x) ** 2) - ((b - y) / 5) ** 2

    def run(self):
        while not self.search.done:
            self.update()
        return self.search


def test_the_peak_is_found_and_becomes_the_target():
    search = World(ThresholdSearch(20_000, prompts=20)).run()
    assert search.target == search.best
    assert search.best == pytest.approx(PEAK, rel=0.05)
    assert all(search.hits)  # the cap of 2,500 is far off
    assert search.spent(0) == 20 * len(search.evaluations)


def test_a_lower_gold_is_never_taken_for_better():
    """Each new best point raised gold: a search that minimised would end at the far corner."""
    search = World(ThresholdSearch(20_000, prompts=20)).run()
    golds = [gold for _, gold in search.evaluations]
    assert golds[search.stood.index(search.best)] == max(golds)
    assert max(golds) > max(golds[:3])


def test_the_start_lies_around_the_configured_thresholds():
    world = World(ThresholdSearch(20_000, prompts=20, spread=0.5))
    while len(world.trail) < 3:
        world.update()
    assert world.trail == [(0.5, 12.0), (0.75, 12.0), (0.5, 13.0)]  # half of 0.5 - 0 and of 12 - 10


@pytest.mark.parametrize("budget", range(150, 400, 11))
def test_the_budget_is_never_overdrawn_nor_left_lying(budget):
    world = World(ThresholdSearch(budget, prompts=20), speed=0.1)
    search = world.run()
    spent = search.spent(world.rollouts)
    assert budget - 30 < spent <= budget  # another update and evaluation would not have fitted
    assert len(search.evaluations) >= 3


def test_a_point_that_cannot_be_reached_is_given_up_at_its_cap():
    world = World(ThresholdSearch(600, cap=50, prompts=10), speed=0.0)
    for _ in range(4):
        world.update()
    assert not world.search.evaluations
    world.update()
    assert world.search.evaluations == [((0.5, 12.0), world.gold())]
    assert world.search.hits == [False]
    assert world.search.best == (0.0, 10.0)  # where the policy stood, not where it should have gone
    assert world.search.since == 50
    assert world.search.metrics(50)["search/reached"] == 0


@pytest.mark.parametrize("after", [0, 3, 17, 60])
def test_a_search_taken_up_again_goes_on_as_it_would_have(after):
    straight, stopped = (World(ThresholdSearch(3000, cap=50, prompts=20), speed=0.1) for _ in range(2))
    for _ in range(after):
        stopped.update()
    state = json.loads(json.dumps(stopped.search.state()))
    stopped.search = Search(stopped.search.options, stopped.search.first)
    stopped.search.load(state)
    assert straight.run() == stopped.run()
    assert len(straight.search.evaluations) > 5


@pytest.mark.parametrize(
    ("options", "first"),
    [({}, {"b": 12.0, "a": 0.5}), ({}, {"a": 0.6, "b": 12.0}), ({"spread": 0.4}, {"a": 0.5, "b": 12.0})],
)
def test_a_state_of_a_search_that_set_out_elsewhere_is_refused(options, first):
    state = World(ThresholdSearch(3000)).search.state()
    with pytest.raises(UserError, match="expected the same thresholds and spread"):
        Search(ThresholdSearch(3000, **options), first).load(state)
    Search(ThresholdSearch(3000), {"a": 0.5, "b": 12.0}).load(state)


def test_a_threshold_where_the_policy_starts_gives_no_direction():
    with pytest.raises(UserError, match=r"constraint b: .* threshold 10\.0, which must differ"):
        Search(ThresholdSearch(3000), {"a": 1.0, "b": 10.0}).aim(START, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be >= 1, got 0"),
        ({"budget": 9, "cap": 0}, "cap must be >= 1"),
        ({"budget": 9, "tolerance": 1.0}, "tolerance must be in"),
        ({"budget": 9, "spread": -0.05}, "spread must be further from 0"),
        ({"budget": 9, "prompts": 0}, "prompts must be >= 1"),
        ({"budget": 9, "samples": 0}, "samples must be >= 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        ThresholdSearch(**options)


# the module


class Unsure(Scorer):
    def score(self, prompts, responses, categories=None):
        return Scores(torch.full((len(responses),), math.nan))


def searching(model, *, search=None, constraints=None, **options):
    options = {"sampling": Sampling(max_new_tokens=8), "optimizer": Optimizer(lr=1e-2, eps=1e-4)} | options
    found = ThresholdSearchModule(
        search or ThresholdSearch(200, cap=16, prompts=6),
        model_name_or_path=model,
        rewards={"a": Letters("a"), "e": Letters("e")},
        objective=NegativeKL(),
        kl=FixedKL(0.1),
        constraints=constraints or [Equal("a", 0.5), Equal("e", 0.4)],
        ppo=PPOOptions(epochs=1, minibatches=2, scale_samples=16),
        seed=3,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the critic's heads
        found.configure_model()
    return found


def data_of(model, folder, **options):
    return prompts(model, folder, **{"validation_fraction": 0.5, "gold": Letters("o")} | options)


def ready(model, folder, **options):
    data = data_of(model, folder)
    data.setup("fit")
    module = searching(model, **options)
    module.encoder = data.encoder
    module.measure_scale([example.row.prompt for example in data.examples("train").items[:8]])
    module.judge_by(data.gold, data.probe_prompts(100))
    module.aim()
    return module, data, next(iter(data.train_dataloader()))


def test_gold_is_the_mean_over_the_last_validation_prompts_and_the_same_each_time(tiny_llama_path, tmp_path):
    module, data, _ = ready(tiny_llama_path, tmp_path, search=ThresholdSearch(200, prompts=6, samples=2))
    seen = []

    class Watched(Letters):
        def score(self, prompts, responses, categories=None):
            seen.append((prompts, responses))
            return super().score(prompts, responses, categories)

    module._gold = Watched("o")
    gold = module.evaluate()
    assert gold == module.evaluate()
    wanted = [prompt for prompt, _ in data.probe_prompts(100)][-6:]
    assert [given for given, _ in seen] == [wanted] * 4
    assert not set(wanted) & {example.row.prompt for example in data.examples("train").items}
    assert seen[0][1] != seen[1][1]  # two samples a prompt
    scores = torch.cat([Letters("o").score(*pair).total for pair in seen[:2]])
    assert gold == pytest.approx(scores.double().mean().item(), abs=1e-12)


def test_an_update_that_reaches_its_target_is_evaluated_and_aims_on(tiny_llama_path, tmp_path):
    module, _, batch = ready(tiny_llama_path, tmp_path)
    experience, _ = experience_of(module, batch)
    values = module.constraint_values(experience)
    assert module.finish(experience, 0.1)["search/evaluations"] == 0
    module.multipliers.set_thresholds(values)  # as if the update had landed there
    module.search.target = tuple(values.values())
    metrics = module.finish(experience, 0.1)
    assert metrics["search/evaluations"] == 1
    assert metrics["search/episodes"] == 2 * 8 + 6
    assert metrics["search/reached"] == 1
    assert metrics["search/gold"] == metrics["search/best_gold"] == module.evaluate()
    assert metrics["search/best/a"] == values["a"]
    aimed = {name: entry["threshold"] for name, entry in module.multipliers.report().items()}
    assert aimed == module.search.named(module.search.target)
    assert aimed != values


@pytest.mark.parametrize(
    ("kind", "threshold", "value", "holds"),
    [
        (Equal, 1.0, 0.96, True), (Equal, 1.0, 0.94, False), (Equal, 1.0, 1.04, True), (Equal, 1.0, 1.06, False),
        (AtLeast, 1.0, 0.96, True), (AtLeast, 1.0, 0.94, False), (AtLeast, 1.0, 9.0, True),
        (AtMost, -1.0, -0.96, True), (AtMost, -1.0, -0.94, False), (AtMost, -1.0, -9.0, True),
    ],
)  # fmt: skip
def test_a_constraint_is_reached_within_five_percent_of_the_way_or_where_it_holds(
    tiny_llama_path, kind, threshold, value, holds
):
    module = searching(tiny_llama_path, constraints=[kind("a", threshold)])  # the start is 0
    assert module.arrived({"a": value}) is holds


def test_nothing_of_the_policy_is_disturbed_by_an_evaluation(tiny_llama_path, tmp_path):
    module, _, _ = ready(tiny_llama_path, tmp_path)
    module.train()
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in module.named_parameters()}
    module.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    assert module.policy.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())


@pytest.mark.parametrize(
    ("data", "search", "message"),
    [
        ({"gold": None}, {}, "needs a gold scorer, and the data have none"),
        ({"validation_fraction": 0.0}, {}, "needs validation prompts"),
        ({}, {"prompts": 50}, r"search.prompts is 50; expected no more than the \d+ validation prompts"),
        ({}, {"budget": 41}, "search.budget is 41 episodes; expected at least 42"),  # 3 x (8 + 6)
    ],
)
def test_what_cannot_be_searched_is_refused_at_the_start(tiny_llama_path, tmp_path, data, search, message):
    module = searching(tiny_llama_path, search=ThresholdSearch(**{"budget": 200, "prompts": 6} | search))
    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, barebones=True)
    with pytest.raises(UserError, match=message):
        trainer.fit(module, data_of(tiny_llama_path, tmp_path, **data))


def test_a_search_needs_constraints_and_finite_gold(tiny_llama_path, tmp_path):
    with pytest.raises(UserError, match="constraints to name at least one"):
        ThresholdSearchModule(ThresholdSearch(200), model_name_or_path=tiny_llama_path)
    module, _, _ = ready(tiny_llama_path, tmp_path)
    module._gold = Unsure()
    with pytest.raises(UserError, match="Unsure scored a response nan"):
        module.evaluate()


class Watch(Callback):
    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def train(model, folder, updates, resume=None):
    module, watch = searching(model), Watch()
    probe = GoldProbe(every_n_steps=4, n_prompts=3, sampling=Sampling(max_new_tokens=8))
    trainer = Trainer(
        accelerator="cpu", max_steps=2 * updates, limit_val_batches=0, num_sanity_val_steps=0, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[probe, watch, ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=2)],
    )  # fmt: skip
    trainer.fit(module, data_of(model, folder), ckpt_path=resume)
    return module, watch.logged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no pre-optimization state.*", "ignore:.*callback states in checkpoint.*")
@pytest.mark.parametrize("stop", [3, 4])  # between two evaluations, and right after one
def test_a_run_taken_up_again_is_the_run_that_never_stopped(tiny_llama_path, tmp_path, stop):
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, logged = train(tiny_llama_path, folders[0], 9)
    train(tiny_llama_path, folders[1], stop)
    parts, rest = train(tiny_llama_path, folders[1], 9, folders[1] / "last.ckpt")
    assert len(whole.search.evaluations) >= 3
    assert parts.search == whole.search
    assert len(rest) == 9 - stop
    for a, b in zip(logged[stop:], rest, strict=True):
        assert {name: a[name] for name in b} == b
    assert logged[-1]["search/episodes"] == whole.examples_seen + 6 * len(whole.search.evaluations)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    records = [json.loads(x) for x in (folders[0] / "lightning_logs/version_0/probe.jsonl").read_text().splitlines()]
    assert records[0]["method"] == "ppo_nelder_mead"
    assert records[0]["constraints"]["a"]["threshold"] == 0.5
    last = records[-1]["constraints"]
    assert {n: e["best_threshold"] for n, e in last.items()} == whole.search.named(whole.search.best)
    assert {n: e["threshold"] for n, e in last.items()} == whole.search.named(whole.search.target)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama_path):
    """The same search on one process, on two by DDP and FSDP2, and killed within a point and taken up again."""
    out = tmp_path_factory.mktemp("searches")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    two = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29673"]
    for strategy, launch, cases in (("ddp", two, "search"), ("fsdp", two, "search"), ("resume", [], "search:2")):
        worker = ["-m", "tests.modules.search_worker", str(out), strategy, tiny_llama_path, cases]
        done = subprocess.run(
            [sys.executable, *launch, *worker], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return out


def logged(folder, name="auto-0"):
    return json.loads((folder / f"{name}.json").read_text())["search"]["logged"]


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_search_as_one_and_propose_the_same(runs, strategy):
    one, ranks = logged(runs / "search" / "whole"), [logged(runs, f"{strategy}-{rank}") for rank in (0, 1)]
    assert len(one) == 7
    assert one[-1]["search/evaluations"] >= 3
    assert ranks[0] == ranks[1]
    for a, b in zip(one, ranks[0], strict=True):
        for name, value in a.items():
            if name.startswith(("search/", "constraint/")):
                assert b[name] == pytest.approx(value, abs=2e-4, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.multi
def test_a_killed_search_goes_on_as_if_nothing_had_happened(runs):
    whole, parts = logged(runs / "search" / "whole"), logged(runs / "search" / "parts")
    assert len(parts) == 5
    for a, b in zip(whole[2:], parts, strict=True):
        assert {name: a[name] for name in b} == b
