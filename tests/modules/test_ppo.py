"""PPO's phases, one by one and without a Trainer, and whole runs with probe and logger."""

import json
import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import GoldProbe, PeakCheckpoint, Throughput
from lit_rlhf.functional.aggregation import WorstCase
from lit_rlhf.functional.constrained import AtLeast, AtMost, Equal
from lit_rlhf.functional.control import AdaptiveKL, FixedKL
from lit_rlhf.models.backbone import LoRA
from lit_rlhf.models.scorers import Ensemble
from lit_rlhf.modules.multipliers import Dual
from lit_rlhf.modules.objective import NegativeKL, Satisficing, WeightedReward
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_options import CriticOptions, PPOOptions
from lit_rlhf.modules.ppo_streams import reward_streams
from lit_rlhf.types import Sampling, UserError
from tests.modules.ppo_parts import Constant, Letters, Words, experience_of, module, prompts, ready
from tests.modules.test_modules import fit

ONE_STEP = {"epochs": 1, "minibatches": 1}


def weights(found):
    return {name: p.detach().clone() for name, p in found.named_parameters() if p.requires_grad}


def test_the_first_minibatch_meets_the_policy_that_sampled(tiny_llama_path, tmp_path):
    ppo, optimizer, batch = ready(tiny_llama_path, tmp_path, ppo=ONE_STEP)
    experience, before = experience_of(ppo, batch)
    metrics = ppo.update_policy(experience, optimizer)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/clipfrac"] == 0
    assert metrics["policy/approxkl"] < 1e-12
    assert metrics["loss/policy"] == pytest.approx(0, abs=1e-6)  # the advantages' mean
    assert before["objective/kl"] == 0
    assert before["policy/sampler_mismatch"] < 1e-5
    assert 0 < before["objective/ended"] <= 1 or before["objective/length"] == 8


def test_every_phase_changes_what_it_should(tiny_llama_path, tmp_path):
    ppo, optimizer, batch = ready(tiny_llama_path, tmp_path, constraints=[Equal("e", 1.0)], kl=AdaptiveKL(0.1, 0.5))
    start = weights(ppo)
    experience, metrics = experience_of(ppo, batch)
    assert experience.advantages.shape[-1] == 2
    assert all(torch.equal(start[name], value) for name, value in weights(ppo).items())
    metrics |= ppo.update_policy(experience, optimizer)
    assert any(not torch.equal(start[name], value) for name, value in weights(ppo).items())
    assert metrics["policy/steps"] == 8
    assert ppo.multipliers.report()["e"]["multiplier"] == 0
    metrics |= ppo.update_multipliers(experience)
    mean = experience.constraint_values[:, 0].mean().item()
    assert metrics["constraint/e/value"] == pytest.approx(mean, abs=1e-6)
    assert math.copysign(1, metrics["constraint/e/multiplier"]) == math.copysign(1, 1.0 - mean)
    assert ppo.finish(experience, metrics["objective/kl"]) == {"objective/kl_coefficient": pytest.approx(0.1)}
    assert ppo.progress.kl_coefficient.item() == pytest.approx(0.1 * 0.98)  # KL 0 is far below the target
    assert (ppo.updates, ppo.examples_seen) == (1, 8)


def test_samples_belong_to_seed_update_and_row(tiny_llama_path, tmp_path):
    ppo, _, batch = ready(tiny_llama_path, tmp_path)
    first = ppo.rollout(batch)
    torch.manual_seed(99)
    assert ppo.rollout(batch).responses == first.responses
    ppo.progress.updates += 1
    assert ppo.rollout(batch).responses != first.responses


@pytest.mark.parametrize("size", [1, 3])
def test_small_passes_change_nothing(tiny_llama_path, tmp_path, size):
    ends, logged = [], []
    for options in ({}, {"micro_batch_size": size, "rollout_batch_size": size}):
        steps = {"epochs": 1, "minibatches": 2, "entropy_coefficient": 0.01} | options
        ppo, optimizer, batch = ready(
            tiny_llama_path,
            tmp_path,
            ppo=steps,
            lr=0.1,
            constraints=[AtLeast("e", 0.3)],
            optimizer=Optimizer("sgd", 0.1),
        )
        experience, metrics = experience_of(ppo, batch)
        logged.append(metrics | ppo.update_policy(experience, optimizer))
        ends.append(weights(ppo))
    assert logged[1] == pytest.approx(logged[0], abs=1e-5)
    for name, value in ends[0].items():
        assert (ends[1][name] - value).abs().max() < 1e-6, name


def ppo_scores(ppo, rollout):
    return {name: ppo.scale.to_units(name, found.total) for name, found in ppo.score(rollout).items()}


def with_values(ppo, experience_args, constants):
    """Let the critic say constants, one a stream."""
    index, rollout, scores = experience_args
    reference, values = ppo.judged(rollout)
    ppo.judged = lambda _: (reference, torch.ones_like(values) * torch.tensor(constants))
    return ppo.advantages(index, rollout, scores)[0]


def test_the_baseline_of_each_stream_is_its_own_head(tiny_llama_path, tmp_path):
    steps = {"standardise": False, "gae_lambda": 1.0}
    constraints = [AtLeast("e", 0.0), AtMost("a", 0.0)]
    ppo, _, batch = ready(tiny_llama_path, tmp_path, ppo=steps, constraints=constraints, kl=FixedKL(0.0))
    rollout = ppo.rollout(batch)
    scores = ppo.score(rollout)
    experience = with_values(ppo, (batch.index, rollout, scores), (10.0, 20.0, 30.0))
    a, e = (ppo.scale.to_units(name, scores[name].total)[:, None] for name in ("a", "e"))
    for stream, expected in enumerate((a + e - 10, e - 20, a - 30)):
        found = experience.advantages[..., stream]
        assert torch.allclose(found, torch.where(experience.mask, expected, 0), atol=1e-5), stream
        assert torch.allclose(experience.targets[..., stream], torch.where(experience.mask, expected, 0) +
                              experience.mask * 10.0 * (stream + 1), atol=1e-5)  # fmt: skip


def test_each_stream_is_standardised_alone_and_a_constant_one_only_centred(tiny_llama_path, tmp_path):
    ppo, _, batch = ready(tiny_llama_path, tmp_path, objective=NegativeKL(), constraints=[AtLeast("e", 0.0)])
    rollout = ppo.rollout(batch)
    scores = ppo.score(rollout)
    reference, values = ppo.judged(rollout)
    noise = 0.01 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    ppo.judged = lambda _: (reference, noise)
    experience, _ = ppo.advantages(batch.index, rollout, scores)
    task, other = experience.advantages[experience.mask].double().unbind(-1)
    assert task.mean().abs() < 1e-6
    assert task.std(correction=0) < 0.05  # KL is 0 at first: nothing but the critic's noise, which stays small
    assert other.mean().abs() < 1e-6
    assert other.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_the_first_update_of_a_task_without_signal_is_silent(tiny_llama_path, tmp_path):
    """At step 0 the KL is 0 and so are the values: nothing is there to be standardised into noise."""
    ppo, _, batch = ready(tiny_llama_path, tmp_path, objective=NegativeKL(), constraints=[AtLeast("e", 0.0)])
    rollout = ppo.rollout(batch)
    scores = ppo.score(rollout)
    experience, _ = ppo.advantages(batch.index, rollout, scores)
    assert not experience.values.any()
    assert experience.advantages[..., 0].abs().max() < 1e-6
    assert experience.advantages[..., 1][experience.mask].std() > 0.5


def test_kl_weighs_the_same_whatever_the_multiplier_in_reward_minus_cost(tiny_llama_path, tmp_path):
    steps = {"standardise": False, "gae_lambda": 1.0}
    found = []
    for init in (-3.0, 0.0, 3.0):
        ppo, optimizer, batch = ready(
            tiny_llama_path, tmp_path, ppo=steps, constraints=[AtMost("e", 0.0)], kl=FixedKL(0.5), lr=0.05,
            dual=Dual(form="reward_minus_cost", init=init),
        )  # fmt: skip
        learnt, _ = experience_of(ppo, batch)
        ppo.multipliers.get_buffer("e/multiplier").fill_(0.0)  # the same first update in all three
        ppo.update_policy(learnt, optimizer)
        ppo.multipliers.get_buffer("e/multiplier").fill_(init)
        ppo.progress.updates += 1
        rollout = ppo.rollout(batch)
        scores = ppo.score(rollout)
        nothing = {name: type(s)(torch.full_like(s.total, float(ppo.scale.get_buffer(f"{name}/mean"))))
                   for name, s in scores.items()}  # fmt: skip
        experience = with_values(ppo, (batch.index, rollout, nothing), (0.0, 0.0))
        found.append(ppo.mixed(experience))
    assert found[0].abs().max() > 1e-3
    for other in found[1:]:
        assert torch.allclose(other, found[0], atol=1e-5)


def test_kl_itself_can_be_held_at_a_threshold(tiny_llama_path, tmp_path):
    ppo, optimizer, batch = ready(tiny_llama_path, tmp_path, constraints=[AtMost("kl", 0.5)], kl=FixedKL(0.0), lr=0.05)
    experience, _ = experience_of(ppo, batch)
    ppo.update_policy(experience, optimizer)
    experience, metrics = experience_of(ppo, batch)
    assert metrics["objective/kl"] > 0.01
    assert experience.constraint_values.mean().item() == pytest.approx(metrics["objective/kl"], rel=1e-5)
    assert ppo.start("kl") == 0
    rollout = ppo.rollout(batch)
    stream = reward_streams(ppo, ppo_scores(ppo, rollout), rollout, ppo.judged(rollout)[0])[..., 1]
    assert stream.sum(-1).tolist() == pytest.approx(experience.constraint_values[:, 0].tolist(), abs=1e-4)


def test_constraints_are_measured_unclipped_and_unpenalised(tiny_llama_path, tmp_path):
    steps = {"unended_penalty": 5.0}
    options = {"constraints": [AtLeast("e", 0.0)], "clip_scores": 0.1, "kl": FixedKL(0.0)}
    ppo, _, batch = ready(tiny_llama_path, tmp_path, ppo=steps, **options)
    rollout = ppo.rollout(batch)
    scores = ppo.score(rollout)
    experience, metrics = ppo.advantages(batch.index, rollout, scores)
    units = ppo.scale.to_units("e", scores["e"].total)
    assert torch.equal(experience.constraint_values[:, 0], units)
    assert units.abs().max() > 0.1
    assert metrics["objective/scores/e/normalised"] == pytest.approx(units.mean().item(), abs=1e-6)
    assert metrics["objective/scores/e/clipped"] == pytest.approx(units.clamp(-0.1, 0.1).mean().item(), abs=1e-6)
    assert metrics["objective/scores/e/raw"] == pytest.approx(scores["e"].total.mean().item(), abs=1e-6)
    assert not rollout.ended.all()
    expected = metrics["objective/scores"] - 5.0 * (~rollout.ended).float().mean().item()
    assert metrics["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-5)


def test_sizes_of_streams_are_logged_before_standardising(tiny_llama_path, tmp_path):
    ppo, _, batch = ready(tiny_llama_path, tmp_path, constraints=[AtLeast("e", 0.0)], kl=FixedKL(0.0))
    rollout = ppo.rollout(batch)
    scores = ppo.score(rollout)
    reference, values = ppo.judged(rollout)
    mask = rollout.response_mask
    ppo.judged = lambda _: (reference, mask[..., None] * torch.tensor([-2.0, 3.0]).expand(*values.shape))
    _, metrics = ppo.advantages(batch.index, rollout, scores)
    assert metrics["stream/task/value"] == pytest.approx(2)
    assert metrics["stream/e/value"] == pytest.approx(3)
    size = ppo.scale.to_units("e", scores["e"].total).abs().mean().item()
    assert metrics["stream/e/reward"] == pytest.approx(size, rel=1e-5)
    assert metrics["stream/e/advantage"] > 1.2  # far from one unit: the baseline is 3 off
    assert metrics["objective/kl_penalty"] == 0


def test_the_lowest_member_is_logged(tiny_llama_path, tmp_path):
    """Of letters that a response counts, the one that it has least of."""
    worst = Ensemble([Letters("a"), Letters("e")], aggregator=WorstCase())
    ppo, _, batch = ready(tiny_llama_path, tmp_path, rewards={"both": worst})
    rollout = ppo.rollout(batch)
    members = ppo.score(rollout)["both"].members
    _, metrics = ppo.advantages(batch.index, rollout, ppo.score(rollout))
    less = ((members[:, 0] < members[:, 1]) + 0.5 * (members[:, 0] == members[:, 1])).mean().item()
    assert 0 < less < 1
    assert metrics["objective/scores/both/min_member/0"] == pytest.approx(less)
    assert metrics["objective/scores/both/min_member/1"] == pytest.approx(1 - less)


def test_a_process_without_a_prompt_is_told(tiny_llama_path, tmp_path):
    ppo, _, _ = ready(tiny_llama_path, tmp_path)
    with pytest.raises(UserError, match="0 prompts to measure the rewards' scale on 1 processes"):
        ppo.measure_scale([])


def test_values_per_token_weigh_long_responses(tiny_llama_path, tmp_path):
    ppo, _, batch = ready(tiny_llama_path, tmp_path, constraints=[AtLeast("e", 0.0)], dual=Dual(per="token"))
    experience, _ = experience_of(ppo, batch)
    experience.sequences.response_mask[1, -5:] = False
    experience.sequences.response_mask[2, -2:] = False
    lengths, values = experience.mask.sum(-1), experience.constraint_values[:, 0]
    assert lengths[1] < lengths[0]
    for rows in (slice(None), [1, 2]):
        expected = float((lengths * values)[rows].sum() / lengths[rows].sum())
        assert expected != pytest.approx(float(values[rows].mean()), abs=1e-3)
        chosen = None if isinstance(rows, slice) else rows
        assert ppo.constraint_values(experience, chosen)["e"] == pytest.approx(expected, abs=1e-6)


def test_multipliers_may_move_with_every_minibatch(tiny_llama_path, tmp_path):
    ppo, optimizer, batch = ready(
        tiny_llama_path, tmp_path, constraints=[AtLeast("e", 9.0)], dual=Dual(every="minibatch")
    )
    experience, _ = experience_of(ppo, batch)
    ppo.update_policy(experience, optimizer)
    ppo.update_multipliers(experience)
    assert ppo.multipliers.steps == 8


def test_an_update_stops_where_the_policy_has_gone_far_enough(tiny_llama_path, tmp_path):
    ppo, optimizer, batch = ready(tiny_llama_path, tmp_path, ppo={"stop_at_kl": 1e-5})
    experience, _ = experience_of(ppo, batch)
    metrics = ppo.update_policy(experience, optimizer)
    assert metrics["policy/stopped"] == 1
    assert 1 <= metrics["policy/steps"] < 8


def test_entropy_is_rewarded(tiny_llama_path, tmp_path):
    steps = ONE_STEP | {"entropy_coefficient": 0.5}
    ppo, optimizer, batch = ready(tiny_llama_path, tmp_path, ppo=steps)
    experience, _ = experience_of(ppo, batch)
    metrics = ppo.update_policy(experience, optimizer)
    assert 0 < metrics["policy/entropy"] < math.log(44)
    parts = metrics["loss/policy"] + 0.5 * metrics["loss/value"] - 0.5 * metrics["policy/entropy"]
    assert metrics["loss"] == pytest.approx(parts, rel=1e-4)


def test_demonstrations_mix_into_the_loss(tiny_llama_path, tmp_path):
    rows = tmp_path / "sft.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": "the cat", "response": w}) + "\n" for w in ("a mat", "the dog sat", "no"))
    )
    steps = ONE_STEP | {"ptx_coefficient": 2.0}
    ppo, optimizer, _ = ready(tiny_llama_path, tmp_path, ppo=steps)
    data = prompts(tiny_llama_path, tmp_path, sft=str(rows))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch.sft.index) == 8
    experience, _ = experience_of(ppo, batch)
    logps, mask = ppo.logps(batch.sft.sequences).detach(), batch.sft.sequences.response_mask
    metrics = ppo.update_policy(experience, optimizer, batch.sft)
    assert metrics["loss/ptx"] == pytest.approx(-(logps[mask].mean()).item(), rel=1e-5)
    parts = metrics["loss/policy"] + 0.5 * metrics["loss/value"] + 2.0 * metrics["loss/ptx"]
    assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
    with pytest.raises(UserError, match=r"data\.sft"):
        ppo.update_policy(experience, optimizer)


def test_demonstrations_go_round(tiny_llama_path, tmp_path):
    rows = tmp_path / "sft.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "the cat", "response": f"a {w}"}) + "\n" for w in ["dog"] * 30))
    data = prompts(tiny_llama_path, tmp_path, sft=str(rows))
    data.setup("fit")
    loader = data.train_dataloader()
    first = sorted(i for batch in loader for i in batch.sft.index.tolist())
    loader.set_epoch(1)
    second = sorted(i for batch in loader for i in batch.sft.index.tolist())
    assert first == list(range(24))
    assert second == sorted([*range(24, 30), *range(18)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_stops_the_run(tiny_llama_path, tmp_path, value):
    class Broken(Letters):
        def score(self, prompts, responses, categories=None):
            scores = super().score(prompts, responses)
            scores.total[1] = value
            return scores

    ppo, _, batch = ready(tiny_llama_path, tmp_path)
    ppo.rewards["e"] = Broken()
    with pytest.raises(UserError, match="reward 'e' scored"):
        ppo.score(ppo.rollout(batch))


def test_a_loss_that_is_not_finite_updates_nothing(tiny_llama_path, tmp_path):
    ppo, optimizer, batch = ready(tiny_llama_path, tmp_path)
    experience, _ = experience_of(ppo, batch)
    start = weights(ppo)
    experience.advantages.fill_(math.nan)
    with pytest.raises(UserError, match="not finite: loss"):
        ppo.update_policy(experience, optimizer)
    assert all(torch.equal(start[name], value) for name, value in weights(ppo).items())


def test_negative_kl_is_told_once(tiny_llama_path, tmp_path):
    ppo, _, batch = ready(tiny_llama_path, tmp_path)
    experience, _ = experience_of(ppo, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kl in (-1, -1, 1, -1, -1, -1, -1, -1, -1, -1):
            ppo.finish(experience, float(kl))
    assert len([w for w in caught if "negative in 5 updates" in str(w.message)]) == 1


def test_units_are_those_of_the_reference_policys_samples(tiny_llama_path, tmp_path):
    ppo, _, _ = ready(tiny_llama_path, tmp_path, rewards={"words": Words()})
    data = prompts(tiny_llama_path, tmp_path)
    data.setup("fit")
    texts = [example.row.prompt for example in data.examples("train").items[:16]]
    scores = ppo.score(ppo.sampled(texts, list(range(16)), None, (0, 1)))["words"].total
    units = ppo.scale.to_units("words", scores)
    assert units.mean().abs() < 1e-6
    assert units.std(correction=0) == pytest.approx(1, abs=1e-5)
    assert ppo.start("words") == 0
    raw = module(tiny_llama_path, rewards={"words": Words()}, units="raw")
    raw.encoder = ppo.encoder
    raw.measure_scale(texts)
    assert raw.start("words") == pytest.approx(scores.mean().item())
    assert torch.equal(raw.scale.to_units("words", scores), scores)
    constant = module(tiny_llama_path, rewards={"same": Constant()})
    constant.encoder = ppo.encoder
    with pytest.raises(UserError, match=r"'same' scores all 16 samples.*\(2\.5\)"):
        constant.measure_scale(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": WeightedReward({"b": 1.0})}, "names 'b'; the rewards are a, e"),
        ({"objective": Satisficing({"b": 1.0})}, "names 'b'; the rewards are a, e"),
        ({"constraints": [AtLeast("b", 1.0)]}, "names 'b'; expected one of a, e, kl"),
        ({"objective": NegativeKL(), "kl": FixedKL(0.0)}, "kl.coefficient > 0"),
        ({"rewards": {"kl": Letters()}}, "not 'kl'"),
        ({"rewards": {"a.b": Letters()}}, "without dots"),
        ({"clip_scores": 0.0}, "clip_scores must be > 0, got 0"),
        ({"lora": LoRA(r=4, alpha=8, dropout=0.1)}, r"lora\.dropout must be 0 in PPO, got 0\.1"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    defaults = {"rewards": {"a": Letters("a"), "e": Letters("e")}}
    with pytest.raises(UserError, match=message):
        PPOModule(**defaults | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "ppo.epochs must be >= 1, got 0"),
        ({"gamma": 1.5}, r"ppo.gamma must be in \[0, 1\], got 1.5"),
        ({"clip_range": 0.0}, "ppo.clip_range must be > 0"),
        ({"unended_penalty": -1.0}, "ppo.unended_penalty must be >= 0"),
        ({"scale_samples": 1}, "ppo.scale_samples must be >= 2"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        PPOOptions(**options)


@pytest.mark.parametrize(
    ("objective", "constraints", "name"),
    [
        (None, None, "ppo"),
        (Satisficing({"a": 1.0}), None, "ppo_sat"),
        (NegativeKL(), [AtLeast("a", 1.0)], "ppo_mu"),
        (NegativeKL(), [Equal("a", 1.0)], "ppo_xi"),
        (None, [AtMost("a", 1.0), AtMost("e", 1.0)], "ppo_all"),
        (None, [AtLeast("a", 1.0)], "ppo_lagrangian"),
    ],
)
def test_methods_have_names(objective, constraints, name):
    made = PPOModule({"a": Letters("a"), "e": Letters("e")}, objective, constraints, kl=FixedKL(0.1))
    assert made.method == name


def test_the_policy_learns_what_is_rewarded(tiny_llama_path, tmp_path):
    ppo, optimizer, _ = ready(tiny_llama_path, tmp_path, rewards={"a": Letters("a")}, kl=FixedKL(0.0), lr=3e-3)
    data = prompts(tiny_llama_path, tmp_path, batch_size=24)
    data.setup("fit")
    batch, seen = next(iter(data.train_dataloader())), []
    for _ in range(6):
        experience, metrics = experience_of(ppo, batch)
        ppo.update_policy(experience, optimizer)
        ppo.finish(experience, metrics["objective/kl"])
        seen.append(metrics["objective/scores"])
    assert seen[-1] > seen[0] + 0.5


def test_a_run_logs_probes_and_keeps_its_peak(tiny_llama_path, tmp_path):
    data = prompts(tiny_llama_path, tmp_path, gold=Letters("t"))
    ppo = PPOModule(
        {"a": Letters("a"), "e": Letters("e")}, NegativeKL(), [Equal("a", 0.5), Equal("e", 0.5)], kl=FixedKL(0.1),
        model_name_or_path=tiny_llama_path, ppo=PPOOptions(epochs=2, minibatches=2, scale_samples=16, stop_at_kl=1e-4),
        sampling=Sampling(max_new_tokens=8), optimizer=Optimizer(lr=1e-3), seed=0,
    )  # fmt: skip
    probe = GoldProbe(every_n_steps=4, n_prompts=4, sampling=Sampling(max_new_tokens=8))
    peak = PeakCheckpoint(every_n_steps=4)
    logger = TensorBoardLogger(str(tmp_path), name="run")
    trainer = fit(ppo, data, probe, peak, Throughput(every_n_steps=2), steps=-1, max_epochs=2, logger=logger,
                  log_every_n_steps=1)  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "run/version_0/probe.jsonl").read_text().splitlines()]
    assert found[0]["method"] == "ppo_xi"
    assert found[0]["constraints"]["a"] == {"value": 0, "threshold": 0.5, "multiplier": 0, "weight": 0}
    assert found[-1]["update"] == 6
    assert found[-1]["examples_seen"] == 48
    assert found[-1]["constraints"]["e"]["multiplier"] != 0
    assert set(found[-1]["constraints"]) == {"a", "e"}
    assert trainer.global_step < 24  # updates stopped early, and still every multiple passed was probed and saved
    kept = torch.load(tmp_path / "run/version_0/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == trainer.global_step
    assert peak.best_model_score is not None
    again = PPOModule.load_from_checkpoint(tmp_path / "run/version_0/checkpoints/last.ckpt", weights_only=True)
    assert again.multipliers.report() == ppo.multipliers.report()
    assert again.updates == 6
    tags = trainer.logged_metrics
    for tag in ("objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy", "policy/approxkl",
                "policy/clipfrac", "loss/policy", "loss/value", "val/ratio", "constraint/a/value",
                "constraint/a/threshold", "constraint/a/violation", "constraint/a/multiplier",
                "constraint/a/weight", "objective/task_weight"):  # fmt: skip
        assert tag in tags, tag
    assert tags["step"] == trainer.global_step


def test_a_plain_checkpoint_callback_works_too(tiny_llama_path, tmp_path):
    ppo = PPOModule({"a": Letters("a")}, model_name_or_path=tiny_llama_path, ppo=PPOOptions(1, 2, scale_samples=16),
                    sampling=Sampling(max_new_tokens=8), seed=0)  # fmt: skip
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_epochs=1, save_top_k=-1)
    fit(ppo, prompts(tiny_llama_path, tmp_path), saver, steps=4)
    assert len(list((tmp_path / "kept").iterdir())) >= 1


def test_a_rollout_smaller_than_its_minibatches_is_refused(tiny_llama_path, tmp_path):
    ppo = PPOModule({"a": Letters("a")}, model_name_or_path=tiny_llama_path, ppo=PPOOptions(minibatches=4))
    with pytest.raises(UserError, match=r"batch_size 3 on 1 processes"):
        fit(ppo, prompts(tiny_llama_path, tmp_path, batch_size=3), steps=4)


def test_no_reward_at_all_is_refused(tiny_llama_path, tmp_path):
    ppo = PPOModule(model_name_or_path=tiny_llama_path)
    with pytest.raises(UserError, match=r"model\.rewards names no reward model"):
        fit(ppo, prompts(tiny_llama_path, tmp_path), steps=4)


def test_validation_samples_held_out_prompts(tiny_llama_path, tmp_path):
    ppo = PPOModule({"a": Letters("a")}, model_name_or_path=tiny_llama_path, ppo=PPOOptions(1, 2, scale_samples=16),
                    sampling=Sampling(max_new_tokens=8), seed=0)  # fmt: skip
    data = prompts(tiny_llama_path, tmp_path, validation_fraction=0.3)
    trainer = fit(ppo, data, steps=4, limit_val_batches=1.0)
    trainer.validate(ppo, data, verbose=False)
    assert "val/objective/scores/a/raw" in trainer.callback_metrics
    assert trainer.callback_metrics["val/objective/kl"].isfinite()


@pytest.mark.parametrize("form", ["heads", "lora", "model"])
def test_every_form_of_critic_trains(tiny_llama_path, tmp_path, form):
    lora = None if form == "model" else LoRA(r=2, alpha=4)
    ppo, optimizer, batch = ready(
        tiny_llama_path, tmp_path, critic=CriticOptions(form=form, lr=5e-3), lora=lora, constraints=[Equal("e", 0.5)]
    )
    experience, _ = experience_of(ppo, batch)
    groups = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    first = ppo.update_policy(experience, optimizer)
    for before, group in zip(groups, optimizer.param_groups, strict=True):
        assert any(not torch.equal(x, p) for x, p in zip(before, group["params"], strict=True))
    for _ in range(3):
        last = ppo.update_policy(experience, optimizer)
    assert last["value/error"] < first["value/error"]
    assert ppo.proxy(ppo.rollout(batch)).parts.keys() == {"a", "e"}
