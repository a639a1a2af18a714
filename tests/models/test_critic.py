"""The critic: a value before each response token, from the policy's states, its base, or a body of its own."""

import pytest
import torch

from lit_rlhf.functional.sequence import chunked_logps_and_entropy
from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions
from lit_rlhf.models.critic import Critic
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.types import Sequences, UserError
from tests.models.test_backbone import rows

LORA = LoRA(r=4, alpha=8)
FORMS = ["heads", "lora", "model"]


def pair(path, form, *, streams=3, lora=LORA, fresh=False):
    torch.manual_seed(0)
    policy = Backbone(path, ModelOptions(lora=lora))
    critic = Critic(policy, path=path, options=ModelOptions(lora=lora), streams=streams, form=form)
    if not fresh:  # as after some training
        torch.nn.init.normal_(critic.heads.weight, std=0.1)
    return policy, critic


@pytest.fixture(params=["llama", "gpt2", "neox"])
def path(request):
    return request.getfixturevalue(f"tiny_{request.param}_path")


@pytest.mark.parametrize("form", FORMS)
def test_values_stand_at_response_tokens_alone_whatever_the_padding(path, form):
    _, critic = pair(path, form)
    plain, left = critic(rows()), critic(rows(left=3, right=2))
    assert plain.shape == (2, 9, 3)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(left[:, 3:-2], plain, rtol=0, atol=1e-5)
    assert (plain[~rows().response_mask] == 0).all()
    assert (plain[rows().response_mask] != 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_value_does_not_see_its_token_and_sees_the_one_before(path, form):
    _, critic = pair(path, form)
    base, other = rows(), rows()
    other.ids[0, 6] = base.ids[0, 6] % 20 + 5
    before, after = critic(base)[0], critic(other)[0]
    torch.testing.assert_close(after[:7], before[:7], rtol=0, atol=1e-6)  # the value at column 6 comes first
    assert (after[7] - before[7]).abs().max() > 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_all_values_are_zero_at_first(tiny_llama_path, form):
    _, critic = pair(tiny_llama_path, form, fresh=True)
    assert not critic(rows()).any()


@pytest.mark.parametrize(
    ("form", "lora"), [(form, lora) for form in FORMS for lora in (None, LORA) if form != "lora" or lora is not None]
)
def test_one_pass_for_policy_and_values_equals_two(path, form, lora):
    policy, critic = pair(path, form, lora=lora)
    logps, values = critic.policy_and_values(rows(), 0.7)
    assert torch.equal(logps, policy(rows(), 0.7))
    torch.testing.assert_close(values, critic(rows()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "reaches"), [("heads", {"policy"}), ("lora", {"critic"}), ("model", {"body"})])
def test_the_values_gradient_reaches_what_the_form_says(tiny_llama_path, form, reaches):
    policy, critic = pair(tiny_llama_path, form)
    for layer in policy.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad and name == "weight":
                torch.nn.init.normal_(parameter, std=0.1)
    critic(rows()).square().sum().backward()
    hit = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    found = {"critic" if ".critic." in name else "policy" for name in hit}
    if critic.body is not None and any(p.grad is not None for p in critic.body.parameters()):
        found.add("body")
    assert found == reaches
    assert critic.heads.weight.grad.abs().sum() > 0


def test_a_critic_adapter_shares_the_base_and_leaves_policy_and_reference_alone(path):
    policy = Backbone(path, ModelOptions(lora=LORA))
    before, count = policy(rows()), sum(p.numel() for p in policy.parameters())
    critic = Critic(policy, path=path, options=ModelOptions(lora=LORA), streams=2, form="lora")
    for name, parameter in policy.named_parameters():
        if ".critic." in name:
            assert parameter.requires_grad
            torch.nn.init.normal_(parameter, std=0.3)
    values = critic(rows())
    assert torch.equal(policy(rows()), before)
    with policy.adapters_off():
        torch.testing.assert_close(policy(rows()), Backbone(path)(rows()), rtol=0, atol=1e-6)
    assert torch.equal(critic(rows()), values)
    own = [p for name, p in policy.named_parameters() if ".default." in name]
    assert sum(p.numel() for p in policy.parameters()) - count == sum(p.numel() for p in own)
    assert all(p.requires_grad for p in own)
    assert not any(p.requires_grad for name, p in policy.named_parameters() if "lora_" not in name)


def test_a_body_of_its_own_may_come_from_a_reward_model(tiny_llama_path, tmp_folder):
    from lit_rlhf.encoding import Encoder

    RewardModel(tiny_llama_path).export(tmp_folder, Encoder.from_pretrained(tiny_llama_path).tokenizer)
    policy = Backbone(tiny_llama_path)
    critic = Critic(policy, path=str(tmp_folder), options=ModelOptions(), streams=1, form="model")
    assert not any("score" in name for name, _ in critic.named_parameters())
    torch.testing.assert_close(critic.body(rows()), policy.states(rows()), rtol=0, atol=1e-6)
    assert {id(p) for p in critic.parameters()}.isdisjoint(id(p) for p in policy.parameters())


def test_an_adapter_without_a_frozen_base_is_refused(tiny_llama_path):
    policy = Backbone(tiny_llama_path)
    with pytest.raises(UserError, match=r"expected model\.lora to be set"):
        Critic(policy, path=tiny_llama_path, options=ModelOptions(lora=LORA), streams=1, form="lora")
    with pytest.raises(UserError, match=r"needs critic\.lora"):
        Critic(policy, path=tiny_llama_path, options=ModelOptions(), streams=1, form="lora")


def test_an_unknown_or_repeated_adapter_is_refused(tiny_llama_path):
    policy = Backbone(tiny_llama_path, ModelOptions(lora=LORA))
    policy.add_adapter("second", LORA, trainable=False)
    with pytest.raises(UserError, match="'second' already"):
        policy.add_adapter("second", LORA, trainable=False)
    with pytest.raises(UserError, match="no adapter 'third'"), policy.adapter("third"):
        pass
    policy(rows())  # the switches are back


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_those_of_the_full_distributions(path, temperature):
    policy = Backbone(path)
    logps, entropy = policy.logps_and_entropy(rows(), temperature)
    torch.testing.assert_close(logps, policy(rows(), temperature), rtol=0, atol=1e-5)
    sequences: Sequences = rows()
    model = policy.causal_lm.eval()
    logits = model(input_ids=sequences.ids, attention_mask=sequences.attention_mask.long()).logits / temperature
    expected = torch.distributions.Categorical(logits=logits[:, :-1]).entropy()
    mask = sequences.response_mask[:, 1:]
    torch.testing.assert_close(entropy[:, 1:][mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert (entropy[~sequences.response_mask] == 0).all()


def test_chunked_entropy_and_its_gradient_by_definition():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 6, (700,), generator=generator)
    logps, entropy = chunked_logps_and_entropy(hidden, weight, labels)
    p = (hidden @ weight.T).softmax(-1)
    expected = -(p * p.log()).sum(-1)
    torch.testing.assert_close(entropy, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(logps, p.gather(-1, labels[:, None])[:, 0].log(), rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(entropy.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
