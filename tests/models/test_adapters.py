"""Several adapters on one copy of the weights: who is in use, who is trained, what is written, and all that sharded.

python -m tests.models.test_adapters OUT MODEL FOLDER      (a worker of the last test, alone or by torchrun)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_rlhf.encoding import Encoder
from lit_rlhf.models.adapters import lora_layers
from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions
from lit_rlhf.models.critic import Critic
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.models.scorers import HFRewardModel
from lit_rlhf.models.shared_reward import SharedAdapterReward
from lit_rlhf.types import UserError
from tests.models.test_backbone import plain_logps, rows

ROOT = Path(__file__).parent.parent.parent
OPTIONS = ModelOptions(lora=LoRA(r=4, alpha=8))
PROMPTS = ["the cat sat", "who is the dog", "a bird sang"]
RESPONSES = ["on the mat", "bad because the tree ran", "yes"]


def loud(module, *, seed=0):
    """Draw every second LoRA matrix anew, since those of zeros hide which adapter is in use."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def reward_folder(path, folder):
    torch.manual_seed(3)
    model = loud(RewardModel(path, ModelOptions(lora=LoRA(r=3, alpha=5))), seed=7)
    model.export(folder, Encoder.from_pretrained(path).tokenizer)
    return str(folder)


def base_numbers(module):
    return sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)


@pytest.fixture(params=["llama", "gpt2", "neox"])
def path(request):
    return request.getfixturevalue(f"tiny_{request.param}_path")


def test_policy_critic_reference_and_reward_are_one_copy_of_the_weights(path, tmp_path):
    folder = reward_folder(path, tmp_path / "rm")
    policy = loud(Backbone(path, OPTIONS), seed=1)
    alone = policy(rows())
    critic = Critic(policy, path=path, options=OPTIONS, streams=2, form="lora")
    reward = SharedAdapterReward(folder)
    reward.attach(policy)
    both = torch.nn.ModuleList([policy, critic])
    assert base_numbers(both) == base_numbers(Backbone(path)) + base_numbers(critic.heads)
    assert not any(p.requires_grad for name, p in policy.named_parameters() if "lora_" not in name)
    trained = {name.split(".")[-2] for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {"default", "critic"}
    for name, parameter in policy.named_parameters():
        if ".critic." in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(policy(rows()), alone)
    scores = reward.score(PROMPTS, RESPONSES).total
    torch.testing.assert_close(scores, HFRewardModel(folder).score(PROMPTS, RESPONSES).total, rtol=0, atol=1e-5)
    with policy.adapters_off():
        torch.testing.assert_close(policy(rows()), plain_logps(path, rows()), rtol=0, atol=1e-5)
    assert torch.equal(policy(rows()), alone)


def test_a_critic_on_layers_the_policy_leaves_alone_trains_no_base(tiny_llama_path):
    policy = loud(Backbone(tiny_llama_path, ModelOptions(lora=LoRA(r=4, target_modules=("q_proj",)))), seed=1)
    alone = policy(rows())
    policy.add_adapter("critic", LoRA(r=2, target_modules=("down_proj",)), trainable=True)
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    for name, parameter in policy.named_parameters():
        if ".critic." in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(policy(rows()), alone)  # its layers are new, and are not in use by default
    with policy.adapter("critic"):
        critic = policy(rows())
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            torch.nn.init.normal_(parameter)
    with policy.adapter("critic"):
        assert torch.equal(policy(rows()), critic)  # the policy's layers are off meanwhile


def test_contexts_nest_and_each_gives_back_what_it_found(path):
    policy = Backbone(path, OPTIONS)
    policy.add_adapter("other", LoRA(r=2), trainable=True)
    loud(policy, seed=1)
    own = policy(rows())
    with policy.adapter("other"):
        other = policy(rows())
    with policy.adapters_off():
        off = policy(rows())
        with policy.adapter("other"):
            assert torch.equal(policy(rows()), other)
        assert torch.equal(policy(rows()), off)
    with policy.adapter("other"):
        with policy.adapters_off():
            assert torch.equal(policy(rows()), off)
        assert torch.equal(policy(rows()), other)
    with pytest.raises(RuntimeError), policy.adapter("other"):
        raise RuntimeError
    assert torch.equal(policy(rows()), own)
    assert not any(torch.equal(a, b) for a, b in ((own, other), (own, off), (other, off)))


def test_switching_leaves_gradients_on(tiny_llama_path):
    policy = Backbone(tiny_llama_path, OPTIONS)
    policy.add_adapter("other", LoRA(r=2), trainable=True)
    policy.add_adapter("frozen", LoRA(r=2), trainable=False)
    wanted = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in wanted} == {"default", "other"}
    for context in (policy.adapters_off(), policy.adapter("other"), policy.adapter("frozen")):
        with context:
            assert {name for name, p in policy.named_parameters() if p.requires_grad} == wanted
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == wanted


def test_checkpointed_layers_recompute_under_the_adapter_in_use(tiny_llama_path):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = Backbone(tiny_llama_path, ModelOptions(lora=OPTIONS.lora, activation_checkpointing=checkpointing))
        policy.add_adapter("critic", LoRA(r=2), trainable=True)
        loud(policy, seed=1)
        with policy.adapter("critic"):
            states = policy.states(rows())
            states.square().sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(".critic." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("merged", [False, True])
def test_an_exported_policy_holds_its_own_adapter_alone(path, merged, tmp_folder):
    policy = Backbone(path, OPTIONS)
    policy.add_adapter("critic", LoRA(r=2), trainable=True)
    loud(policy, seed=1)
    policy.export(tmp_folder, Encoder.from_pretrained(path).tokenizer, merged=merged)
    torch.testing.assert_close(Backbone(str(tmp_folder))(rows()), policy(rows()), rtol=0, atol=1e-5)
    assert not any(place.is_dir() for place in tmp_folder.iterdir())


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), ".*lm_head"])
def test_an_adapter_on_the_output_head_is_refused(tiny_llama_path, targets):
    with pytest.raises(UserError, match="output head"):
        Backbone(tiny_llama_path, OPTIONS).add_adapter("critic", LoRA(target_modules=targets), trainable=True)


def test_an_adapter_that_matches_nothing_is_refused(tiny_llama_path):
    with pytest.raises(UserError, match=r"lora\.target_modules=\('nothing',\)"):
        Backbone(tiny_llama_path, OPTIONS).add_adapter("x", LoRA(target_modules=("nothing",)), trainable=True)


def measure(path, folder, form):
    """Train policy and critic two steps on rows that all processes share; return what all of them then say."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    policy = Backbone(path, OPTIONS)
    reward = SharedAdapterReward(folder, batch_size=2)
    reward.attach(policy)
    critic = Critic(policy, path=path, options=OPTIONS, streams=2, form=form)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        policy.shard(mesh)
        critic.shard(mesh)
    parameters = [p for module in (policy, critic) for p in module.parameters()]
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        logps, values = policy(rows()), critic(rows())
        (-logps.sum() + (values - 1).square().sum()).backward()  # FSDP's mean over equal shares is one process's
        optimizer.step()
    with torch.no_grad():
        found = {"logps": policy(rows()), "values": critic(rows())}
        with policy.adapters_off():
            found["reference"] = policy(rows())
    found["scores"] = reward.score(PROMPTS, RESPONSES).total
    local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
    about = {"local": local, "all": sum(p.numel() for p in parameters), "layers": len(lora_layers(policy.model))}
    return {name: x.flatten().tolist() for name, x in found.items()} | about


@pytest.mark.multi
@pytest.mark.slow
def test_all_of_them_sharded_over_two_processes_equal_one(tiny_llama_path, tmp_path):
    folder = reward_folder(tiny_llama_path, tmp_path / "rm")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for launch in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29677"]):
        worker = ["-m", "tests.models.test_adapters", str(tmp_path), tiny_llama_path, folder]
        done = subprocess.run(
            [sys.executable, *launch, *worker], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    plain = HFRewardModel(folder).score(PROMPTS, RESPONSES).total.tolist()
    reference = plain_logps(tiny_llama_path, rows()).flatten().tolist()
    for form, expected in one.items():
        assert expected["scores"] == pytest.approx(plain, abs=1e-5)
        assert expected["reference"] == pytest.approx(reference, abs=1e-5)
        assert expected["logps"] != pytest.approx(reference, abs=1e-2)  # the steps did something
        for found in (entry[form] for entry in two):
            for name in ("logps", "values", "reference", "scores"):
                assert found[name] == pytest.approx(expected[name], abs=1e-5), (form, name)
            assert found["local"] < 0.7 * found["all"]


def main(out, path, folder):
    torch.set_num_threads(1)
    world, rank = (os.environ.get(name, default) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if world != "1":
        torch.distributed.init_process_group("gloo")
    found = {form: measure(path, folder, form) for form in ("lora", "heads", "model")}
    Path(out, f"{world}-{rank}.json").write_text(json.dumps(found))
    if world != "1":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
