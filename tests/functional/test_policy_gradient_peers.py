"""One rollout and two epochs of TRL's experimental PPO, whose own numbers are compared with ours.

TRL has no functions for its mathematics, so its trainer runs and every tensor is read from its training loop. Compared:
log-probabilities, KL rewards, the missing-end penalty, GAE, standardised advantages, both clipped losses, both clip
fractions, the k2 estimate. Differences of definition, each shown below:

1. TRL pays an ended response's score one token after its end token and counts that token's value; here the end token is
   paid, and nothing is valued behind it. Responses that fill the length limit agree end to end. (A padding token that
   the policy itself draws ends a response for TRL.)
2. TRL divides by n - 1 in the variance of advantages; here it is n.
3. TRL averages the k2 estimate over padding too.
"""

import sys

import pytest
import torch

from lit_rlhf.functional.policy_gradient import clipped_surrogate, clipped_value, gae, kl_estimates
from lit_rlhf.functional.sequence import standardise, token_logps
from lit_rlhf.functional.shaping import kl_rewards, penalise_unended, terminal_rewards
from tests.conftest import tiny_config, word_tokenizer

trl = pytest.importorskip("trl", reason="extra `peers` is not installed")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

GAMMA, LAMBDA, KL, CLIP, VALUE_CLIP, PENALTY = 0.9, 0.8, 0.3, 0.2, 0.1, 1.5
SAME = {"rtol": 1e-4, "atol": 1e-5}


def trainer_and_reward_model(folder):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    config = tiny_config("llama", tokenizer)
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    config.num_labels = 1
    reward, value = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))
    arguments = PPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, seed=3,
        save_strategy="no", num_sample_generations=0, disable_tqdm=True, response_length=6, stop_token="eos",
        total_episodes=32, per_device_train_batch_size=32, num_mini_batches=1, num_ppo_epochs=2, learning_rate=2e-2,
        temperature=1.0, gamma=GAMMA, lam=LAMBDA, kl_coef=KL, cliprange=CLIP, cliprange_value=VALUE_CLIP,
        missing_eos_penalty=PENALTY,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": tokenizer("the cat")["input_ids"]}] * 32)
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    return trainer, reward


@pytest.fixture(scope="module")
def epochs(tmp_path_factory):
    """The variables of TRL's training loop at the end of each epoch's loss, copied."""
    from trl.experimental.ppo import ppo_trainer

    kept, plain = [], ppo_trainer.masked_mean

    def spy(values, mask, axis=None):
        caller = sys._getframe(1)
        found = caller.f_locals
        if caller.f_code.co_name == "train" and "pg_loss" in found:  # the last of the loop's four calls
            kept.append({k: v.detach().clone() for k, v in found.items() if isinstance(v, torch.Tensor)})
            kept[-1]["micro_batch_inds"] = torch.from_numpy(found["micro_batch_inds"].copy())
            kept[-1]["pg_clipfrac"] = plain(values, mask, axis)
            kept[-1]["plain_advantages"] = torch.stack(found["advantages_reversed"][::-1], 1)
        return plain(values, mask, axis)

    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        trainer, reward = trainer_and_reward_model(tmp_path_factory.mktemp("trl"))
        patch.setattr(ppo_trainer, "masked_mean", spy)
        trainer.train()
    for at in kept:
        at["mask"], at["wide"] = ~at["padding_mask"], ~at["padding_mask_p1"]
        both = torch.cat([at["queries"], at["postprocessed_responses"]], 1)
        pad, start = word_tokenizer().pad_token_id, at["queries"].shape[1]
        at["raw_scores"] = ppo_trainer.get_reward(reward, both, pad, start)[1].detach()
        at["ended"] = at["contain_eos_token"]
    assert len(kept) == 2
    assert 8 < kept[0]["mask"].all(1).sum() < 30
    assert 0 < kept[0]["ended"].sum() < 32
    return kept


def kept(x, mask):
    return torch.where(mask, x, 0)


def test_log_probabilities(epochs):
    for at in epochs:
        found = token_logps(at["logits"], at["mb_responses"])
        mask = at["mask"][at["micro_batch_inds"]]
        torch.testing.assert_close(kept(found, mask), kept(at["new_logprobs"], mask), **SAME)


def test_rewards_of_responses_that_fill_the_limit(epochs):
    at, rows = epochs[0], epochs[0]["mask"].all(1)
    scores = penalise_unended(at["raw_scores"], at["ended"], PENALTY)
    torch.testing.assert_close(scores, at["scores"], **SAME)
    charged = kl_rewards(at["logprobs"], at["ref_logprobs"], at["mask"], KL)
    found = terminal_rewards(scores, at["mask"]) + charged
    torch.testing.assert_close(found[rows], at["rewards"][rows], **SAME)
    kl = kl_estimates(at["logprobs"], at["ref_logprobs"], at["mask"])["k1"]
    torch.testing.assert_close(kl.float(), at["kl"].sum(1), **SAME)


def test_advantages_and_targets_of_the_same_rewards(epochs):
    """All rows, with TRL's own rewards and its mask that goes on for one token."""
    at = epochs[0]
    advantages, targets = gae(at["rewards"], at["values"], at["wide"], GAMMA, LAMBDA)
    torch.testing.assert_close(advantages, kept(at["plain_advantages"], at["wide"]), **SAME)
    torch.testing.assert_close(targets, kept(at["returns"], at["wide"]), **SAME)


def test_full_responses_agree_from_score_to_target_and_shorter_ones_do_not(epochs):
    at = epochs[0]
    charged = kl_rewards(at["logprobs"], at["ref_logprobs"], at["mask"], KL)
    rewards = terminal_rewards(at["scores"], at["mask"]) + charged
    advantages, targets = gae(rewards, at["values"], at["mask"], GAMMA, LAMBDA)
    rows = at["mask"].all(1)
    torch.testing.assert_close(advantages[rows], at["plain_advantages"][rows], **SAME)
    torch.testing.assert_close(targets[rows], at["returns"][rows], **SAME)
    assert (advantages - kept(at["plain_advantages"], at["mask"]))[~rows].abs().amax(1).min() > 1e-3  # difference 1


def test_standardised_advantages_but_for_the_count(epochs):
    at = epochs[0]
    found = standardise(at["plain_advantages"], at["mask"], center=True)
    n = at["mask"].sum()
    torch.testing.assert_close(found * ((n - 1) / n).sqrt(), at["advantages"], **SAME)


@pytest.mark.parametrize("epoch", [0, 1])
def test_clipped_losses(epochs, epoch):
    at, rows = epochs[epoch], epochs[epoch]["micro_batch_inds"]
    mask, wide = at["mask"][rows], at["wide"][rows]
    policy = clipped_surrogate(at["new_logprobs"], at["mb_logprobs"], at["mb_advantage"], mask, CLIP)
    torch.testing.assert_close(policy.loss.sum() / mask.sum(), at["pg_loss"], **SAME)
    torch.testing.assert_close(policy.metrics["clipped"].sum() / mask.sum(), at["pg_clipfrac"], **SAME)
    value = clipped_value(at["vpred"], at["mb_values"], at["mb_return"], wide, VALUE_CLIP)
    torch.testing.assert_close(value.loss.sum() / wide.sum(), at["vf_loss"], **SAME)
    torch.testing.assert_close(value.metrics["clipped"].sum() / wide.sum(), at["vf_clipfrac"], **SAME)
    everywhere = 0.5 * at["logprobs_diff"].square().mean()  # difference 3
    torch.testing.assert_close(policy.metrics["approx_kl"].sum() / mask.numel(), everywhere, **SAME)
    assert (at["pg_clipfrac"] > 0) == (epoch == 1), "the second epoch must clip for this to say anything"
