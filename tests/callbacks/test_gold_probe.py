"""The gold probe on a real, tiny policy: a table of next-token logits that learns to say one word more often."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from callbacks import GoldProbe, Throughput
from lit_rlhf import records
from lit_rlhf.types import Rollout, Sampling, Scorer, Scores, Sequences, Share, UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),  # a part in eval mode is the point here
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* not empty"),  # and so is a run that goes on
]

WORDS = ("<end>", "fine", "good", "bad")
KEYS = {
    "method", "label", "seed", "config_hash", "step", "update", "examples_seen", "epoch", "kl_k1", "kl_k1_se", "kl_k2",
    "kl_k2_se", "kl_k3", "kl_k3_se", "proxy", "proxy_se", "proxy_members", "proxy_std", "proxy_by",
    "implicit_reward", "implicit_margin", "implicit_accuracy", "gold", "gold_se", "gold_by", "proxy_z", "gold_z",
    "constraints", "win_rate", "win_rate_se", "length", "eos_rate", "n_prompts", "n_samples", "sampling", "seconds",
}  # fmt: skip


class Policy(pl.LightningModule):
    """Next word from the last one; dropout makes it draw on the global generator while it trains."""

    method = "toy"

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.table = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("start", self.table.detach().clone())
        self.body = nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Identity()))
        self.body[1].eval()
        self.losses = []

    def sample(self, prompts, generator, sampling):
        assert not self.training
        assert not torch.is_grad_enabled()
        torch.rand(3)  # a policy that forgets its generators must not disturb training either
        steps = sampling.max_new_tokens
        uniforms = torch.stack([torch.rand(steps, generator=g) for g in generator])
        token, ids = torch.ones(len(prompts), dtype=torch.long), []
        for t in range(steps):
            probs = self.table[token].div(sampling.temperature).softmax(-1)
            token = (probs.cumsum(-1) < uniforms[:, t, None]).sum(-1).clamp_max(3)
            ids.append(token)
        ids = torch.stack(ids, 1)
        ended = (ids == 0).any(1)
        mask = (ids == 0).cumsum(1) - (ids == 0).long() == 0
        before = torch.cat([torch.ones_like(ids[:, :1]), ids], 1)  # a prompt of one token
        whole = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)
        rows = Sequences(before, torch.ones_like(whole), whole)
        texts = [
            " ".join(WORDS[i] for i, m in zip(*row, strict=True) if m and i)
            for row in zip(ids.tolist(), mask.tolist(), strict=True)
        ]
        logps = self._logps(self.table, rows, sampling)
        return Rollout(prompts, texts, rows, logps, logps, ended, sampling)

    def reference_logps(self, rollout):
        return self._logps(self.start, rollout.sequences, rollout.sampling)

    def proxy(self, rollout):
        assert rollout.categories == [None] * len(rollout.responses)  # those of the prompts
        members = torch.tensor(
            [[float(r.count("good")), float(r.count("good") + r.count("fine"))] for r in rollout.responses]
        )
        return Scores(members.mean(1), members=members)

    def probe_extras(self, rollout, logps, reference_logps):
        return {"implicit_reward": 0.1 * (logps - reference_logps).sum(1), "implicit_margin": 0.25}

    @staticmethod
    def _logps(table, rows, sampling):
        logps = table[rows.ids[:, :-1]].div(sampling.temperature).log_softmax(-1)
        return logps.gather(-1, rows.ids[:, 1:, None]).squeeze(-1) * rows.response_mask[:, 1:]

    def training_step(self, batch, batch_idx):
        loss = -self.body(self.table.log_softmax(-1))[:, 2].mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/rewards/margins", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Gold(Scorer):
    """Likes one "good", and tires of more."""

    def score(self, prompts, responses, categories=None):
        assert len(prompts) == len(responses) == len(categories)
        counts = torch.tensor([float(r.count("good")) for r in responses], dtype=torch.float64)
        return Scores(counts - 0.4 * counts**2, parts={"liking": counts, "tiring": -(counts**2)})


class Data(pl.LightningDataModule):
    gold = Gold()

    def __init__(self, n=40):
        super().__init__()
        self.n = n

    def probe_prompts(self, n):
        return [(f"prompt {i} <script>", None) for i in range(min(n, self.n))]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(12, 1), batch_size=2)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1, 1), batch_size=1)


class NoGold(Data):
    gold = None


def fit(folder, *callbacks, module=None, data=None, ckpt_path=None, **options):
    module = module or Policy()
    settings = {"max_steps": 12, "val_check_interval": 1.0, "limit_val_batches": 0} | options
    trainer = pl.Trainer(
        accelerator="cpu", logger=TensorBoardLogger(folder, name="toy", version=0), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks), log_every_n_steps=1, **settings,
    )  # fmt: skip
    pl.seed_everything(3, verbose=False)
    trainer.fit(module, datamodule=data or Data(), ckpt_path=ckpt_path)
    return module, trainer, folder / "toy" / "version_0"


def keep(folder, steps, **options):
    return ModelCheckpoint(folder / "ck", every_n_train_steps=steps, save_top_k=-1, filename="{step}", **options)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def probe(**changes):
    return GoldProbe(
        **({"every_n_steps": 4, "n_prompts": 40, "sampling": Sampling(max_new_tokens=6), "batch_size": 16} | changes)
    )


def test_it_changes_nothing_in_training(tmp_path):
    watched, _, _ = fit(tmp_path / "a", probe(every_n_steps=1))
    alone, _, _ = fit(tmp_path / "b")
    assert watched.losses == alone.losses
    assert len(set(watched.losses)) > 6
    assert torch.equal(watched.table, alone.table)


def test_modes_and_random_states_are_put_back(tmp_path):
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            assert module.training
            assert module.body[0].training
            assert not module.body[1].training
            self.state = torch.random.get_rng_state()

    class Check(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            assert module.training
            assert module.body[0].training
            assert not module.body[1].training
            assert torch.equal(watch.state, torch.random.get_rng_state())

    watch = Watch()
    fit(tmp_path, watch, probe(every_n_steps=1), Check(), max_steps=2)


def test_records_have_the_agreed_keys_and_values(tmp_path, capsys):
    _, _, folder = fit(tmp_path, probe())
    found = records.read_probe(folder)
    assert [r["step"] for r in found] == [0, 4, 8, 12]
    assert all(set(r) == KEYS for r in found)
    first, last = found[0], found[-1]
    assert (first["kl_k1"], first["kl_k3"], first["win_rate"], first["gold_z"]) == (0, 0, 0.5, 0)
    assert (first["method"], first["label"], first["seed"], first["examples_seen"]) == ("toy", "toy", 3, 0)
    assert last["kl_k1"] > 0.1
    assert last["proxy_z"] > 0.5
    assert last["implicit_reward"] == pytest.approx(0.1 * last["kl_k1"], rel=1e-5)
    assert last["implicit_margin"] == 0.25
    assert last["gold"] == pytest.approx(last["gold_by"]["liking"] + 0.4 * last["gold_by"]["tiring"], rel=1e-6)
    assert last["proxy"] == pytest.approx(sum(last["proxy_members"]) / 2, rel=1e-6)
    assert len(capsys.readouterr().out.splitlines()) == 4

    rows = [r for r in records.read_samples(folder) if r["step"] == 12]
    assert [r["prompt_index"] for r in rows] == list(range(40))
    assert last["gold"] == pytest.approx(sum(r["gold"] for r in rows) / 40, rel=1e-6)
    assert last["length"] == sum(r["length"] for r in rows) / 40


def test_tensorboard_gets_tags_figure_and_table(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, folder = fit(tmp_path, probe())
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    wanted = {"gold/score", "gold/proxy_gap", "gold/win_rate", "probe/kl_k1", "probe/kl_k3", "probe/sqrt_kl"}
    assert wanted <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("gold/score")] == [0, 4, 8, 12]
    assert "probe/gold_and_proxy" in tags["images"]
    (table, *_) = events.Tensors("probe/samples/text_summary")
    assert b"<script>" not in table.tensor_proto.string_val[0]


def test_the_first_probe_comes_before_any_update_and_the_last_after_all(tmp_path):
    _, _, folder = fit(tmp_path, probe(every_n_steps=5), max_steps=7)
    assert [r["step"] for r in records.read_probe(folder)] == [0, 5, 7]


def test_accumulated_batches_probe_once_a_step(tmp_path):
    _, _, folder = fit(tmp_path, probe(every_n_steps=1), max_steps=3, accumulate_grad_batches=2)
    assert [line["step"] for line in lines(folder, records.PROBE)] == [0, 1, 2, 3]


def test_batch_size_and_other_prompts_change_no_row(tmp_path):
    _, _, a = fit(tmp_path / "a", probe(batch_size=3, samples_per_prompt=2))
    _, _, b = fit(tmp_path / "b", probe(batch_size=64, samples_per_prompt=2, n_prompts=5))
    few = [r for r in records.read_samples(a) if r["prompt_index"] < 5]
    assert [r["response"] for r in few] == [r["response"] for r in records.read_samples(b)]
    assert len({r["response"] for r in few}) > 5


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_prompts_and_make_equally_many_calls(world):
    from callbacks.probe_rows import ProbePlan

    policy, calls = Policy().eval(), []
    plan = ProbePlan([(f"p{i}", None) for i in range(5)], 2, Sampling(max_new_tokens=6), 3, 0, Gold())
    with torch.no_grad():
        alone, _ = plan.measure(policy, 4, 0, 1)
        rows = []
        for rank in range(world):
            before = len(calls)
            policy.sample = lambda *a: calls.append(a) or Policy.sample(policy, *a)
            found = _without_gather(plan, policy, rank, world)
            calls_here = len(calls) - before
            assert calls_here == -(-(-(-5 // world) * 2) // 3)
            rows += found
    assert sorted(rows, key=lambda r: (r["prompt_index"], r["sample_index"])) == alone


def _without_gather(plan, policy, rank, world):
    import callbacks.probe_rows as room

    original = room._gathered
    room._gathered = lambda rows, world: rows
    try:
        return plan.measure(policy, 4, rank, world)[0]
    finally:
        room._gathered = original


def test_checkpoints_and_early_stopping_see_fresh_gold(tmp_path):
    peak = keep(tmp_path, 4, monitor="gold/score", mode="max")
    _, _, folder = fit(tmp_path, probe(), peak, max_steps=24)
    gold = {r["step"]: r["gold"] for r in records.read_probe(folder)}
    seen = {
        int(path.split("step=")[1].split("-v")[0].removesuffix(".ckpt")): float(v)
        for path, v in peak.best_k_models.items()
    }
    assert seen == {step: pytest.approx(gold[step], rel=1e-6) for step in range(4, 25, 4)}
    assert float(peak.best_model_score) == pytest.approx(max(seen.values()))

    class Tired(Data):
        class gold(Scorer):  # noqa: N801
            def score(self, prompts, responses, categories=None):
                Tired.level -= 1
                return Scores(torch.full((len(prompts),), Tired.level))

        level, gold = 0.0, gold()

    stop = EarlyStopping("gold/score", patience=2, mode="max")
    _, trainer, _ = fit(
        tmp_path / "stop", probe(every_n_steps=2), stop, data=Tired(), max_steps=20, val_check_interval=2,
        limit_val_batches=1, num_sanity_val_steps=0,
    )  # fmt: skip
    assert trainer.global_step == 6


def test_a_resumed_run_has_neither_gap_nor_doubled_step(tmp_path):
    _, _, straight = fit(tmp_path / "whole", probe())
    _, _, folder = fit(tmp_path / "cut", probe(), keep(tmp_path, 6), max_steps=10)
    with (folder / records.PROBE).open("a") as file:
        file.write('{"step": 12, "torn')
    fit(tmp_path / "cut", probe(), keep(tmp_path, 6), ckpt_path=tmp_path / "ck" / "step=6.ckpt")
    assert [line["step"] for line in lines(folder, records.PROBE)] == [0, 4, 8, 12]
    assert [(r["step"], r["prompt_index"]) for r in lines(folder, records.SAMPLES)] == [
        (step, i) for step in (0, 4, 8, 12) for i in range(40)
    ]
    timeless = [
        [{k: v for k, v in r.items() if k not in {"seconds", "config_hash"}} for r in records.read_probe(f)]
        for f in (straight, folder)
    ]
    assert timeless[0][:2] == timeless[1][:2]
    assert timeless[1][-1]["win_rate"] is not None


def test_a_record_swallowed_by_a_kill_is_measured_again(tmp_path):
    _, _, folder = fit(tmp_path, probe(every_n_steps=6), keep(tmp_path, 6), max_steps=8)
    before = records.read_probe(folder)
    kept = (folder / records.PROBE).read_text().splitlines(keepends=True)
    (folder / records.PROBE).write_text(kept[0] + kept[1][:50])
    fit(tmp_path, probe(every_n_steps=6), keep(tmp_path, 6), ckpt_path=tmp_path / "ck" / "step=6.ckpt")
    after = lines(folder, records.PROBE)
    assert [r["step"] for r in after] == [0, 6, 12]
    # Lightning resumes at the start of the next epoch; the first run was configured to end sooner
    free = {"seconds": 0, "epoch": 0, "config_hash": ""}
    assert after[1] | free == before[1] | free


def test_without_gold_or_proxy_the_rest_is_measured(tmp_path, capsys):
    class Bare(Policy):
        proxy, probe_extras = staticmethod(lambda rollout: None), staticmethod(lambda *_: {})

    _, _, folder = fit(tmp_path, probe(), module=Bare(), data=NoGold(), limit_val_batches=1)
    last = records.read_probe(folder)[-1]
    empty = ("gold", "gold_se", "gold_by", "gold_z", "win_rate", "win_rate_se", "proxy", "proxy_z", "proxy_members")
    assert [last[name] for name in empty] == [None] * len(empty)
    assert last["kl_k1"] > 0
    assert last["implicit_margin"] == 0.5  # of the last validation
    assert capsys.readouterr().out.count("gold scorer") == 1


def test_a_configured_gold_wins_over_the_data(tmp_path):
    class Seven(Scorer):
        def score(self, prompts, responses, categories=None):
            return Scores(torch.full((len(prompts),), 7.0))

    _, _, folder = fit(tmp_path, probe(gold=Seven()), max_steps=1)
    assert {r["gold"] for r in records.read_probe(folder)} == {7.0}
    assert {r["gold_z"] for r in records.read_probe(folder)} == {None}


def test_seeds_group_by_their_hash_and_examples_are_counted(tmp_path):
    share = Share(torch.tensor(2.5), torch.tensor(20.0))

    class Batch:
        def __init__(self):
            self.share = share

    class Shared(Data):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(12), batch_size=2, collate_fn=lambda _: Batch())

    _, _, folder = fit(tmp_path, probe(), Throughput(2), data=Shared(), max_steps=6)
    assert [r["examples_seen"] for r in records.read_probe(folder)] == [0, 10, 15]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tokens, samples = (events.Scalars(f"perf/{name}_per_second") for name in ("tokens", "samples"))
    assert [e.step for e in tokens] == [2, 4, 6]
    assert tokens[0].value / samples[0].value == pytest.approx(8, rel=1e-4)


class Named(Policy):
    label = "toy beta 0.1"


@pytest.mark.parametrize(
    ("configured", "logger", "module", "expected"),
    [
        ("mine", "run", Named, "mine"),
        (None, "run", Named, "run"),
        (None, "toy", Named, "toy beta 0.1"),
        (None, "lightning_logs", Named, "toy beta 0.1"),
        (None, None, Policy, "toy"),
    ],
)
def test_a_run_is_called_by_the_most_telling_name(tmp_path, configured, logger, module, expected):
    logger = TensorBoardLogger(tmp_path, name=logger)
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, max_steps=1, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1,
        callbacks=[probe(label=configured, n_prompts=2)],
    )  # fmt: skip
    trainer.fit(module(), datamodule=Data())
    assert records.read_probe(logger.log_dir)[0]["label"] == expected


def test_trainer_settings_tell_configurations_apart_and_seeds_do_not(tmp_path):
    def digest(name, **options):
        _, _, folder = fit(tmp_path / name, probe(n_prompts=2), **options)
        last = records.read_probe(folder)[-1]
        assert last["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
        return last["config_hash"]

    plain = digest("a", max_steps=1)
    assert plain == digest("b", max_steps=1)
    others = [
        digest("c", max_steps=2), digest("d", max_steps=1, gradient_clip_val=1.0),
        digest("e", max_steps=1, accumulate_grad_batches=2),
    ]  # fmt: skip
    assert len({plain, *others}) == 4


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ValueError, match="n_prompts must be >= 1, got 0"):
        GoldProbe(n_prompts=0)
    with pytest.raises(UserError, match="probe_prompts"):
        fit(tmp_path, probe(), data=pl.LightningDataModule.from_datasets(torch.zeros(4, 1), torch.zeros(1, 1)))
    with pytest.raises(UserError, match="needs prompts"):
        fit(tmp_path, probe(), data=Data(0))
