"""One update of `PPOModule` beside TRL's experimental PPO: the same models, samples and scores, two clipped steps.

TRL's trainer draws the samples. It draws again any response that holds an end or padding token, since that is where the
two pay differently (`docs/differences.md`); the other difference, n - 1 for n in the variance of advantages, is put
into ours by a factor.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.functional.control import FixedKL
from lit_rlhf.models.backbone import Backbone
from lit_rlhf.modules.base import freeze
from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_options import CriticOptions, PPOOptions
from lit_rlhf.types import Rollout, Sampling, Scores, Sequences
from tests.conftest import tiny_config, word_tokenizer
from tests.modules.ppo_parts import Constant

trl = pytest.importorskip("trl", reason="extra `peers` is not installed")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

ROWS, LENGTH, RATE = 32, 6, 0.5
GAMMA, LAMBDA, KL, CLIP, VALUE_CLIP, VALUE, PENALTY = 0.9, 0.8, 0.3, 0.2, 0.1, 0.4, 1.5
SAME = {"rtol": 1e-4, "atol": 1e-5}


def models(folder):
    """Policy, reference, reward model and value model of TRL, each other weights, written where ours are read from."""
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    config = tiny_config("llama", tokenizer)
    found = {name: AutoModelForCausalLM.from_config(config) for name in ("policy", "reference")}
    config.num_labels = 1
    found |= {name: AutoModelForSequenceClassification.from_config(config) for name in ("reward", "value")}
    for name, model in found.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return tokenizer, found


def without_ends(draw, ends):
    """Repeat a `generate` until every row is without the tokens `ends` once, and put those rows together."""

    def generate(**arguments):
        done = None
        while done is None or not done.all():
            found = draw(**arguments)
            good = ~torch.isin(found.sequences[:, -LENGTH:], ends).any(1)
            scores = torch.stack(found.scores, 1)
            if done is None:
                done, sequences, kept = good, found.sequences, scores
            take = good & ~done
            sequences = torch.where(take[:, None], found.sequences, sequences)
            kept = torch.where(take[:, None, None], scores, kept)
            done = done | good
        return SimpleNamespace(sequences=sequences, scores=kept.unbind(1))

    return generate


def trained(folder, monkeypatch):
    """Run TRL's trainer for one rollout; return the variables of its loop at the last loss, and its trained models."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer, found = models(folder)
    ends = torch.tensor([tokenizer.eos_token_id, tokenizer.pad_token_id])
    found["policy"].generate = without_ends(found["policy"].generate, ends)
    arguments = PPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, seed=3,
        save_strategy="no", num_sample_generations=0, disable_tqdm=True, response_length=LENGTH, total_episodes=ROWS,
        per_device_train_batch_size=ROWS, num_mini_batches=1, num_ppo_epochs=2, temperature=1.0, gamma=GAMMA,
        lam=LAMBDA, kl_coef=KL, cliprange=CLIP, cliprange_value=VALUE_CLIP, vf_coef=VALUE, missing_eos_penalty=PENALTY,
    )  # fmt: skip
    texts = ("the cat", "the", "a dog sat")
    rows = Dataset.from_list([{"input_ids": tokenizer(texts[i % 3])["input_ids"]} for i in range(ROWS)])
    sgd = torch.optim.SGD([*found["policy"].parameters(), *found["value"].parameters()], RATE)
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=found["policy"], ref_model=found["reference"],
        reward_model=found["reward"], value_model=found["value"], train_dataset=rows, eval_dataset=rows,
        optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)),
    )  # fmt: skip
    losses, plain = [], ppo_trainer.masked_mean

    def spy(values, mask, axis=None):
        caller = sys._getframe(1)
        if caller.f_code.co_name == "train" and "pg_loss" in caller.f_locals:
            losses.append(dict(caller.f_locals) | {"pg_clipfrac": plain(values, mask, axis)})
        return plain(values, mask, axis)

    monkeypatch.setattr(ppo_trainer, "masked_mean", spy)
    trainer.train()
    return losses, found


def ours(folder, at, value):
    """The same models and samples, as our module has them."""
    module = PPOModule(
        {"reward": Constant()}, model_name_or_path=str(folder / "policy"), units="raw", kl=FixedKL(KL), seed=0,
        sampling=Sampling(max_new_tokens=LENGTH), critic=CriticOptions("model", path=str(folder / "value")),
        ppo=PPOOptions(
            epochs=2, minibatches=1, gamma=GAMMA, gae_lambda=LAMBDA, clip_range=CLIP, value_clip_range=VALUE_CLIP,
            value_coefficient=VALUE, unended_penalty=PENALTY, max_grad_norm=None,
        ),
    )  # fmt: skip
    module.configure_model()
    module.reference = Backbone(str(folder / "reference"), module.options)
    freeze(module.reference)
    module.critic.heads.weight.data.copy_(value.score.weight)
    module.critic.heads.bias.requires_grad_(False)  # TRL's has none
    ids = at["query_responses"]
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, -LENGTH:] = True
    sequences = Sequences(ids, ids != word_tokenizer().pad_token_id, response)
    with torch.no_grad():
        logps = module.logps(sequences)[:, -LENGTH:]
    ended = torch.zeros(ROWS, dtype=torch.bool)
    return module, Rollout([""] * ROWS, [""] * ROWS, sequences, logps, logps, ended, module.sampling)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """TRL's losses and models after two steps; our module after the same, with its experience and metrics."""
    folder = tmp_path_factory.mktemp("trl")
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        losses, found = trained(folder, patch)
    at = losses[0]
    assert not at["padding_mask"].any()
    assert not at["contain_eos_token"].any()
    started = {
        "policy": AutoModelForCausalLM.from_pretrained(folder / "policy"),
        "value": AutoModelForSequenceClassification.from_pretrained(folder / "value"),
    }
    module, rollout = ours(folder, at, started["value"])
    raw = at["scores"] + PENALTY  # before TRL takes its penalty off
    experience, seen = module.advantages(torch.arange(ROWS), rollout, {"reward": Scores(raw)})
    n = ROWS * LENGTH
    corrected = replace(experience, advantages=experience.advantages * ((n - 1) / n) ** 0.5)
    sgd = torch.optim.SGD(module.parameter_groups(), RATE)
    metrics = module.update_policy(corrected, sgd)
    return SimpleNamespace(
        losses=losses, at=at, trl=found, started=started, module=module, rollout=rollout, experience=corrected,
        seen=seen, metrics=metrics,
    )  # fmt: skip


def test_the_rollout_is_judged_alike(both):
    at, experience = both.at, both.experience
    torch.testing.assert_close(both.rollout.token_logps, at["logprobs"], **SAME)
    torch.testing.assert_close(experience.values[..., 0], at["values"], **SAME)
    torch.testing.assert_close(experience.targets[..., 0], at["returns"], **SAME)
    torch.testing.assert_close(experience.advantages[..., 0], at["advantages"], **SAME)
    assert both.seen["objective/kl"] == pytest.approx(float(at["kl"].sum(1).mean()), rel=1e-4)
    assert both.seen["objective/rlhf_reward"] == pytest.approx(float(at["rewards"].sum(1).mean()), rel=1e-4)


def test_the_losses_of_both_epochs_are_alike(both):
    """Ours are logged as means over the epochs."""
    for tag, key in (("loss/policy", "pg_loss"), ("loss/value", "vf_loss"), ("policy/clipfrac", "pg_clipfrac")):
        expected = sum(at[key].item() for at in both.losses) / 2
        assert both.metrics[tag] == pytest.approx(expected, rel=1e-4, abs=1e-5), tag
    assert both.losses[1]["pg_clipfrac"].item() > 0.05
    assert both.losses[1]["vf_clipfrac"].item() > 0.05


def test_the_steps_lead_to_the_same_weights(both):
    for name, ours, theirs, start in (
        ("policy", both.module.policy.causal_lm, both.trl["policy"], both.started["policy"]),
        ("value", both.module.critic.body.transformer, both.trl["value"].base_model, both.started["value"].base_model),
    ):
        expected, before = theirs.state_dict(), start.state_dict()
        for key, found in ours.state_dict().items():
            torch.testing.assert_close(found, expected[key], **SAME, msg=f"{name}: {key}")
        moved = max(float((expected[key] - before[key]).abs().max()) for key in expected)
        assert moved > 100 * SAME["rtol"], f"{name} hardly moved"
    torch.testing.assert_close(both.module.critic.heads.weight, both.trl["value"].score.weight, **SAME)
