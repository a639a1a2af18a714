"""K reward models as one: each member is what it would be alone, and folders give its scores back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lit_rlhf.functional.aggregation import Mean, UncertaintyWeighted, WorstCase
from lit_rlhf.models.backbone import LoRA, ModelOptions
from lit_rlhf.models.ensemble import RewardEnsemble, load_ensemble, new_ensemble
from lit_rlhf.models.reward import RewardModel, load
from lit_rlhf.models.scorers import EnsembleRewardModel, HFRewardModel
from lit_rlhf.specs import build, plain
from lit_rlhf.types import Scorer, Sequences, UserError
from tests.models.test_reward import ROWS, padded, plain_scores, tokenizer_of

K = 3
MODES = ["lora", "full", "heads"]
PROMPTS = ["the cat", "a dog", "who ran", "please tell"]
RESPONSES = ["sat on the mat", "slept", "why you i we think no yes", "more about time"]


def options(mode: str) -> ModelOptions:
    return ModelOptions(lora=LoRA(r=4, alpha=8) if mode == "lora" else None)


def trained(path: str, mode: str = "lora", members: int | list[int] = K, seed: int = 0) -> RewardEnsemble:
    """An ensemble after three steps, each member on its own rows."""
    model = new_ensemble(path, options(mode), members, mode, seed=seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.forward_grouped(own_rows(members)).sub(1).square().sum().backward()
        optimizer.step()
    return model


def own_rows(members: int | list[int]) -> Sequences:
    numbers = range(members) if isinstance(members, int) else members
    return padded([[token + 1 + number for token in row] for number in numbers for row in ROWS])


@pytest.fixture(params=["llama", "gpt2", "neox"])
def path(request) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_path")


@pytest.mark.parametrize("mode", MODES)
def test_a_member_learns_in_company_what_it_learns_alone(tiny_llama_path, mode):
    together, alone = trained(tiny_llama_path, mode), trained(tiny_llama_path, mode, [2])
    scores = together(padded(ROWS))
    assert scores.shape == (len(ROWS), K)
    torch.testing.assert_close(scores[:, 2], alone(padded(ROWS))[:, 0], rtol=0, atol=1e-5)
    assert (scores[:, 2] - scores[:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_members_of_one_seed_start_apart_and_alike_every_time(tiny_llama_path, mode):
    def start(members, seed):
        return new_ensemble(tiny_llama_path, options(mode), members, mode, seed=seed)

    one, same, alone, other = start(K, 1), start(K, 1), start([1], 1), start(K, 2)
    scores = one(padded(ROWS))
    assert torch.equal(scores, same(padded(ROWS)))
    torch.testing.assert_close(scores[:, 1:2], alone(padded(ROWS)), rtol=0, atol=1e-6)
    for different in (scores[:, 0], other(padded(ROWS))[:, 1]):
        assert (scores[:, 1] - different).abs().min() > 1e-4
    trainable = {name for name, p in one.named_parameters() if p.requires_grad}
    if mode == "heads":
        assert trainable == {f"heads.each.{k}.weight" for k in range(K)}
    if mode == "lora":
        assert all(name.endswith((".A", ".B")) or name.startswith("heads.") for name in trainable)
    if mode == "full":
        assert len(trainable) == len(list(one.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_scoring_one_batch_is_scoring_it_member_by_member(path, mode):
    model = trained(path, mode)
    repeated = padded(ROWS * K)
    torch.testing.assert_close(model(padded(ROWS)), model.forward_grouped(repeated).T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_no_score(path, mode):
    model = trained(path, mode)
    alone = torch.cat([model(padded([row])) for row in ROWS])
    for left in (False, True):
        torch.testing.assert_close(model(padded(ROWS, left=left, pad=17)), alone, rtol=0, atol=1e-5)


def gradients(model: RewardEnsemble, member: int) -> list[torch.Tensor]:
    """Copies of one member's gradients, by where each mode keeps them."""
    layers = [layer for body in model.bodies for layer in body.expert_layers.values()]
    found = [p.grad[member] for layer in layers for p in (layer.A, layer.B)]
    found += [p.grad for p in model.heads.each[member].parameters()]
    found += [p.grad for p in model.bodies[member].parameters()] if model.mode == "full" else []
    return [gradient.clone() for gradient in found]


@pytest.mark.parametrize("mode", MODES)
def test_each_members_gradient_is_clipped_as_it_would_be_alone(tiny_llama_path, mode):
    """Member 1 spikes; members 0 and 2, below and above the limit, are clipped as torch clips each alone."""
    model = trained(tiny_llama_path, mode)
    model.zero_grad()
    weights = torch.tensor([1e-3, 1e3, 1.0])[:, None]
    (model.forward_grouped(own_rows(K)) * weights).sum().backward()
    before = [gradients(model, member) for member in range(K)]
    norms = [torch.cat([g.flatten() for g in own]).norm() for own in before]
    limit = float(norms[2]) / 2
    assert norms[0] < limit < norms[2] < norms[1] / 10
    found = model.clip_gradients(limit)
    torch.testing.assert_close(found, torch.stack(norms))
    for member, own in enumerate(before):
        alone = [torch.nn.Parameter(torch.zeros_like(g)) for g in own]
        for parameter, gradient in zip(alone, own, strict=True):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(alone, limit)
        for parameter, clipped in zip(alone, gradients(model, member), strict=True):
            torch.testing.assert_close(clipped, parameter.grad, rtol=1e-5, atol=0)


# -- folders ---------------------------------------------------------------------------------------------------------


def exported(model: RewardEnsemble, folder, **how) -> str:
    model.set_scale(torch.arange(model.members) - 1.0, torch.arange(model.members) + 0.5)
    model.export(folder, tokenizer_of(model.bodies[0].path), **how)
    return str(folder)


@pytest.mark.parametrize("mode", MODES)
def test_an_exported_ensemble_comes_back_with_its_scores(path, mode, tmp_folder):
    model = trained(path, mode)
    folder = exported(model, tmp_folder)
    again = load_ensemble(folder, ModelOptions())
    assert again.mode == mode
    torch.testing.assert_close(again(padded(ROWS)), model(padded(ROWS)), rtol=0, atol=1e-6)
    assert torch.equal(again.score_mean, model.score_mean)
    assert torch.equal(again.score_std, model.score_std)
    content = json.loads((tmp_folder / "reward.json").read_text())
    assert content["members"] == ["member-0", "member-1", "member-2"]
    assert (content["form"], content["mode"]) == ("reward_ensemble", mode)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_each_member_folder_is_an_ordinary_reward_model(path, mode, tmp_folder):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = trained(path, mode)
    scores = model(padded(ROWS)).detach()
    exported(model, tmp_folder)
    for member in range(K):
        folder = tmp_folder / f"member-{member}"
        tokenizer = tokenizer_of(str(folder))
        if mode == "lora":
            base = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, pad_token_id=tokenizer.pad_token_id
            )
            base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            stranger = PeftModel.from_pretrained(base, folder)
        else:
            stranger = AutoModelForSequenceClassification.from_pretrained(folder)
        torch.testing.assert_close(plain_scores(stranger, tokenizer), scores[:, member], rtol=0, atol=1e-5)
        ours = RewardModel(str(folder), fresh_head=False)
        torch.testing.assert_close(
            ours(padded(ROWS, pad=tokenizer.pad_token_id)).detach(), scores[:, member], rtol=0, atol=1e-5
        )
        assert (ours.score_mean.item(), ours.score_std.item()) == (member - 1.0, member + 0.5)


def test_merged_members_reload_as_full_ones(tiny_llama_path, tmp_folder):
    model = trained(tiny_llama_path)
    again = load_ensemble(exported(model, tmp_folder, merged=True), ModelOptions())
    assert again.mode == "full"
    torch.testing.assert_close(again(padded(ROWS)), model(padded(ROWS)), rtol=0, atol=1e-5)


def test_what_is_no_ensemble_is_refused(tiny_llama_path, tmp_path):
    with pytest.raises(UserError, match="holds no ensemble"):
        load_ensemble(tiny_llama_path, ModelOptions())
    file = tmp_path / "reward.json"
    for text, message in (
        ("{", "Expecting property name"),
        ("[]", "expected a JSON object with `form`"),
        ('{"form": "x"}', "'x'; expected one of reward, reward_ensemble"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load(str(tmp_path))


@pytest.mark.parametrize("members", [0, [], [1, 1], [-1]])
def test_impossible_members_are_refused(tiny_llama_path, members):
    with pytest.raises(UserError, match="members must be a count >= 1"):
        new_ensemble(tiny_llama_path, options("lora"), members)


def test_lora_belongs_to_its_mode(tiny_llama_path):
    with pytest.raises(UserError, match="mode 'lora' with lora None"):
        new_ensemble(tiny_llama_path, options("full"), K, "lora")
    with pytest.raises(UserError, match="mode 'full' with lora LoRA"):
        new_ensemble(tiny_llama_path, options("lora"), K, "full")
    with pytest.raises(UserError, match="mode must be one of lora, full, heads, got 'both'"):
        new_ensemble(tiny_llama_path, options("lora"), K, "both")


# -- the scorer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_llama_path, tmp_path_factory) -> str:
    return exported(trained(tiny_llama_path), tmp_path_factory.mktemp("ensemble"))


def test_the_scorer_gives_each_members_own_score(folder):
    scores = EnsembleRewardModel(folder, raw=True, batch_size=3).score(PROMPTS, RESPONSES)
    assert scores.members.shape == (4, K)
    for member in range(K):
        single = HFRewardModel(f"{folder}/member-{member}").score(PROMPTS, RESPONSES).total
        torch.testing.assert_close(scores.members[:, member], single, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.total, scores.members.mean(1))


def test_members_are_combined_on_one_scale_unless_raw(folder):
    raw = EnsembleRewardModel(folder, raw=True).score(PROMPTS, RESPONSES).members
    scaled = EnsembleRewardModel(folder).score(PROMPTS, RESPONSES).members
    expected = (raw - torch.tensor([-1.0, 0.0, 1.0])) / torch.tensor([0.5, 1.5, 2.5])
    torch.testing.assert_close(scaled, expected)
    normalised = HFRewardModel(f"{folder}/member-2", normalise=True).score(PROMPTS, RESPONSES).total
    torch.testing.assert_close(scaled[:, 2], normalised, rtol=0, atol=1e-5)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_scores_without_a_scale_are_standardised_by_nobody(tiny_llama_path, mode, old, tmp_folder):
    """Also where a folder of an earlier version says 0 and 1 of what was never measured."""
    model = trained(tiny_llama_path, mode)
    model.export(tmp_folder, tokenizer_of(tiny_llama_path))
    described = [tmp_folder / f"member-{k}" / ("score.json" if mode == "lora" else "config.json") for k in range(K)]
    for file in described:
        content = json.loads(file.read_text())
        assert "score_std" not in content
        if old:
            file.write_text(json.dumps(content | {"score_mean": 0.0, "score_std": 1.0}))
    folder = str(tmp_folder)
    raw = EnsembleRewardModel(folder, raw=True).score(PROMPTS, RESPONSES).members
    with pytest.raises(UserError, match=r"members \[0, 1, 2\] of 3 keep no mean .* expected such a fit, or raw: true"):
        EnsembleRewardModel(folder).score(PROMPTS, RESPONSES)
    single = HFRewardModel(f"{folder}/member-1").score(PROMPTS, RESPONSES).total
    torch.testing.assert_close(single, raw[:, 1], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"member-1 keeps no mean .* expected such a model, or normalise: false"):
        HFRewardModel(f"{folder}/member-1", normalise=True).score(PROMPTS, RESPONSES)


def test_the_shipped_reward_models_keep_a_scale():
    for number in range(5):
        HFRewardModel(f"builtin:proxy-{number}", normalise=True).score(PROMPTS, RESPONSES)


def test_a_scale_is_a_number_and_a_positive_spread(tiny_llama_path):
    model = new_ensemble(tiny_llama_path, options("heads"), 2, "heads")
    for mean, std in (([0.0, 0.0], [1.0, 0.0]), ([0.0, torch.inf], [1.0, 1.0]), ([0.0, torch.nan], [1.0, 1.0])):
        with pytest.raises(UserError, match="means must be finite and stds positive"):
            model.set_scale(torch.tensor(mean), torch.tensor(std))
    model.set_scale(torch.tensor([2.0, torch.nan]), torch.tensor([3.0, torch.nan]))
    with pytest.raises(UserError, match=r"members \[1\] of 2 keep no mean"):
        model.standardise(torch.zeros(1, 2))


def test_offsets_between_members_are_no_disagreement(tiny_llama_path, tmp_folder):
    """Two equal members, one shifted and scaled: on one scale UWO subtracts nothing, on raw scores it does."""
    model = trained(tiny_llama_path)
    for layer in model.bodies[0].expert_layers.values():
        layer.A.data[1], layer.B.data[1] = layer.A.data[0], layer.B.data[0]
    model.heads.each[1].weight.data = 2 * model.heads.each[0].weight.data
    model.set_scale(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 1.0, 1.0]))
    model.export(tmp_folder, tokenizer_of(tiny_llama_path))
    pair = {"form": "reward_ensemble", "mode": "lora", "base": tiny_llama_path, "members": ["member-0", "member-1"]}
    (tmp_folder / "reward.json").write_text(json.dumps(pair))
    uwo = UncertaintyWeighted(coefficient=0.5)
    scaled = EnsembleRewardModel(str(tmp_folder), uwo).score(PROMPTS, RESPONSES)
    torch.testing.assert_close(scaled.total, scaled.members[:, 0], rtol=0, atol=1e-5)
    raw = EnsembleRewardModel(str(tmp_folder), uwo, raw=True).score(PROMPTS, RESPONSES)
    assert (raw.members.mean(1) - raw.total).min() > 1e-4


def test_uncertainty_of_weight_zero_is_the_mean_and_the_worst_is_never_above(folder):
    def total(aggregator):
        return EnsembleRewardModel(folder, aggregator).score(PROMPTS, RESPONSES).total

    assert torch.equal(total(UncertaintyWeighted(coefficient=0.0)), total(None))
    assert torch.equal(total(None), total(Mean()))
    assert (total(WorstCase()) < total(None)).all()
    assert (total(UncertaintyWeighted(coefficient=0.5)) < total(None)).all()
    half, full = (total(UncertaintyWeighted(coefficient=c)) for c in (0.5, 1.0))
    torch.testing.assert_close(total(None) - full, 2 * (total(None) - half))


def test_one_member_disagrees_with_nobody(tiny_llama_path, tmp_folder):
    folder = exported(trained(tiny_llama_path, members=1), tmp_folder)
    scores = EnsembleRewardModel(folder, UncertaintyWeighted(coefficient=3.0)).score(PROMPTS, RESPONSES)
    assert scores.members.shape == (4, 1)
    assert torch.equal(scores.total, scores.members[:, 0])


def test_equal_responses_get_equal_scores_by_position(folder):
    """A response that occurs twice is scored where it stands, under its own prompt."""
    prompts, responses = [PROMPTS[0], PROMPTS[1], PROMPTS[0]], ["slept"] * 3
    members = EnsembleRewardModel(folder, batch_size=2).score(prompts, responses).members
    torch.testing.assert_close(members[0], members[2], rtol=0, atol=1e-6)
    assert (members[0] - members[1]).abs().max() > 1e-3
    backwards = EnsembleRewardModel(folder).score(PROMPTS[::-1], RESPONSES[::-1]).members
    forwards = EnsembleRewardModel(folder).score(PROMPTS, RESPONSES).members
    torch.testing.assert_close(backwards.flip(0), forwards, rtol=0, atol=1e-5)


def test_no_responses_give_no_scores(folder):
    assert EnsembleRewardModel(folder).score([], []).members.shape == (0, K)


def test_load_finds_the_scorer_of_a_folder(folder):
    found = load(folder, aggregator=WorstCase())
    assert isinstance(found, EnsembleRewardModel)
    assert found.aggregator == WorstCase()
    assert isinstance(load(f"{folder}/member-0", normalise=True), HFRewardModel)


def test_the_scorer_survives_a_checkpoint(folder):
    scorer = EnsembleRewardModel(folder, UncertaintyWeighted(coefficient=0.1), raw=True)
    again = build(plain(scorer), Scorer)
    assert isinstance(again, EnsembleRewardModel)
    assert (again.path, again.raw, again.aggregator) == (folder, True, scorer.aggregator)


def test_an_adapter_folder_and_an_ensemble_have_the_window_of_their_base(folder):
    for where in (folder, f"{folder}/member-0"):
        scorer = load(where)
        _, encoder = scorer._load()
        assert encoder.max_length == 64


# -- size ------------------------------------------------------------------------------------------------------------


def held(model: torch.nn.Module) -> int:
    """Count the numbers in memory between two steps: parameters and AdamW's two moments."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    return sum(p.numel() for p in model.parameters()) + sum(t.numel() for t in states)


def test_five_members_cost_less_than_one_and_a_half(make_model):
    path = make_model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=4096)
    lora = ModelOptions(lora=LoRA(r=8, alpha=16, target_modules=("q_proj", "v_proj")))
    body = 4096 * 256 + 4 * (4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256) + 256
    adapter = 4 * 2 * 2 * 8 * 256  # layers x (q, v) x (A, B) x rank x width
    member = 3 * (adapter + 256)  # with its head, and both moments
    one, five = (held(new_ensemble(path, lora, count)) for count in (1, 5))
    assert one == body + member
    assert five == body + 5 * member
    assert five < 1.5 * one
    assert one <= held(RewardModel(path, lora)) + 256


def test_member_folders_hold_adapters_only(folder):
    weights = load_file(f"{folder}/member-1/adapter_model.safetensors")
    assert all("lora_" in name or "score" in name for name in weights)
