"""LoRA reward models on the policy's base: the scores of their own folders, on one copy of the weights."""

import pytest
import torch

from lit_rlhf.encoding import Encoder
from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.models.scorers import HFRewardModel
from lit_rlhf.models.shared_reward import SharedAdapterReward
from lit_rlhf.types import UserError

OPTIONS = ModelOptions(lora=LoRA(r=4, alpha=8))
PROMPTS, RESPONSES = ["w5 w6", "w7", "w8 w9 w10"], ["w11 w12 w13", "w14", "w5"]


def folder_of(path, out, *, seed, targets="all-linear"):
    torch.manual_seed(seed)
    model = RewardModel(path, ModelOptions(lora=LoRA(r=3, alpha=5, target_modules=targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.export(out, Encoder.from_pretrained(path).tokenizer)
    return str(out)


@pytest.fixture(params=["llama", "gpt2"])
def path(request):
    return request.getfixturevalue(f"tiny_{request.param}_path")


def test_scores_equal_the_folders_own_for_several_on_one_base(path, tmp_path):
    folders = [folder_of(path, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    policy = Backbone(path, OPTIONS)
    shared = [SharedAdapterReward(folder, batch_size=2) for folder in folders]
    for scorer in shared:
        scorer.attach(policy)
    found = [scorer.score(PROMPTS, RESPONSES).total for scorer in shared]
    for scores, folder in zip(found, folders, strict=True):
        torch.testing.assert_close(scores, HFRewardModel(folder).score(PROMPTS, RESPONSES).total, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().min() > 1e-3


def test_there_is_one_copy_of_the_base_and_nothing_more_is_trained_or_saved(path, tmp_path):
    policy = Backbone(path, OPTIONS)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    before = sum(p.numel() for p in policy.parameters())
    scorer = SharedAdapterReward(folder_of(path, tmp_path / "rm", seed=0))
    scorer.attach(policy)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    added = sum(p.numel() for p in policy.parameters()) - before
    assert 0 < added < before / 2  # rank-3 adapters, no second body
    assert "head" not in dict(policy.named_parameters())


def test_scoring_leaves_the_policy_as_it_was(path, tmp_path):
    policy = Backbone(path, OPTIONS).train()
    encoder = Encoder.from_pretrained(path)
    rows = encoder.collate([row for row in encoder.encode_many(PROMPTS, RESPONSES) if row is not None])
    scorer = SharedAdapterReward(folder_of(path, tmp_path / "rm", seed=0))
    before = policy(rows)
    scorer.attach(policy)
    scorer.score(PROMPTS, RESPONSES)
    assert policy.training
    after = policy(rows)
    assert torch.equal(before, after)
    after.sum().backward()  # the policy's own adapters still learn
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_another_base_is_refused(tiny_llama_path, make_model, tmp_path):
    scorer = SharedAdapterReward(folder_of(make_model("llama", seed=9), tmp_path / "rm", seed=0))
    with pytest.raises(UserError, match=r"is an adapter of .*, and the policy's base is"):
        scorer.attach(Backbone(tiny_llama_path, OPTIONS))


def test_a_policy_without_adapters_a_whole_model_and_no_policy_are_refused(tiny_llama_path, tmp_path):
    folder = folder_of(tiny_llama_path, tmp_path / "rm", seed=0)
    with pytest.raises(UserError, match=r"expected model\.lora to be set"):
        SharedAdapterReward(folder).attach(Backbone(tiny_llama_path))
    with pytest.raises(UserError, match="holds no adapter"):
        SharedAdapterReward(tiny_llama_path).attach(Backbone(tiny_llama_path, OPTIONS))
    with pytest.raises(UserError, match="needs a PPO policy"):
        SharedAdapterReward(folder).score(PROMPTS, RESPONSES)
