"""Scorers: a reward model by its own tokenizer, a function by its import path, an ensemble of either."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_rlhf.functional.aggregation import UncertaintyWeighted, WorstCase
from lit_rlhf.models.backbone import LoRA, ModelOptions
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.models.scorers import Ensemble, FunctionScorer, HFRewardModel
from lit_rlhf.specs import build, plain
from lit_rlhf.types import Scorer, Scores, UserError

PROMPTS = ["the cat sat", "who is the dog", [{"role": "user", "content": "tell me a good time"}], "a bird sang"]
RESPONSES = ["on the mat", "i think it is bad because the tree ran", "yes", "the cat and the bird sang and sang"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def reward_path(request, tmp_path_factory) -> str:
    """A reward model of its own folder, with mean 2 and spread 0.5."""
    from transformers import AutoTokenizer

    source = request.getfixturevalue(f"tiny_{request.param}_path")
    torch.manual_seed(4)
    model = RewardModel(source)
    model.set_scale(2.0, 0.5)
    folder = tmp_path_factory.mktemp("reward")
    model.export(folder, AutoTokenizer.from_pretrained(source))
    return str(folder)


def test_a_score_is_that_of_plain_transformers_on_the_encoders_ids(reward_path):
    from transformers import AutoModelForSequenceClassification

    from lit_rlhf.encoding import Encoder

    encoder, plain_model = (
        Encoder.from_pretrained(reward_path),
        AutoModelForSequenceClassification.from_pretrained(reward_path),
    )
    total = HFRewardModel(reward_path).score(PROMPTS, RESPONSES).total
    assert total.dtype == torch.float32
    for prompt, response, score in zip(PROMPTS, RESPONSES, total, strict=True):
        ids = torch.tensor([encoder.encode(prompt, response).ids])
        torch.testing.assert_close(score, plain_model(ids).logits[0, 0].detach(), rtol=0, atol=1e-5)


def test_a_score_does_not_depend_on_its_batch(reward_path):
    together = HFRewardModel(reward_path).score(PROMPTS, RESPONSES).total
    for batch_size in (1, 3):
        torch.testing.assert_close(HFRewardModel(reward_path, batch_size).score(PROMPTS, RESPONSES).total, together)
    scorer = HFRewardModel(reward_path)
    alone = [scorer.score([p], [r]).total[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(torch.stack(alone), together, rtol=0, atol=1e-5)
    backwards = scorer.score(PROMPTS[::-1], RESPONSES[::-1]).total
    torch.testing.assert_close(backwards.flip(0), together, rtol=0, atol=1e-5)
    assert together.unique().numel() == len(together)


def test_messages_are_rendered_by_the_reward_models_own_template(reward_path, tmp_path):
    from transformers import AutoTokenizer

    prompt = [[{"role": "user", "content": "who sang"}]]
    without = HFRewardModel(reward_path).score(prompt, ["the bird"]).total
    folder = Path(tmp_path / "templated")
    RewardModel(reward_path).export(folder, tokenizer := AutoTokenizer.from_pretrained(reward_path))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} please {% endfor %}"
    tokenizer.save_pretrained(folder)
    templated = HFRewardModel(str(folder)).score(prompt, ["the bird"]).total
    assert abs(templated - without) > 1e-3
    text = HFRewardModel(str(folder)).score(["who sang"], ["the bird"]).total
    torch.testing.assert_close(text, HFRewardModel(reward_path).score(["who sang"], ["the bird"]).total)


def test_normalised_scores_use_the_models_own_scale(reward_path):
    raw = HFRewardModel(reward_path).score(PROMPTS, RESPONSES).total
    normal = HFRewardModel(reward_path, normalise=True).score(PROMPTS, RESPONSES).total
    torch.testing.assert_close(normal, (raw - 2) / 0.5)


def test_no_score_is_changed_by_autocast_or_carries_a_gradient(reward_path):
    scorer = HFRewardModel(reward_path)
    total = scorer.score(PROMPTS, RESPONSES).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer.score(PROMPTS, RESPONSES).total, total)
    assert not total.requires_grad


def test_a_training_module_that_holds_a_scorer_does_not_own_it(reward_path):
    module = torch.nn.Module()
    module.proxy = HFRewardModel(reward_path)
    module.proxy.score(PROMPTS, RESPONSES)
    model, _ = module.proxy._loaded
    assert not list(module.parameters())
    assert not module.state_dict()
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(part.training for part in model.modules())


def test_an_adapter_folder_is_a_scorer_too(tiny_gpt2_path, tmp_folder):
    from transformers import AutoTokenizer

    torch.manual_seed(4)
    model = RewardModel(tiny_gpt2_path, ModelOptions(lora=LoRA(r=2)))
    model.set_scale(1.0, 2.0)
    model.export(tmp_folder, AutoTokenizer.from_pretrained(tiny_gpt2_path))
    full = tmp_folder.parent / "full"
    model.export(full, AutoTokenizer.from_pretrained(tiny_gpt2_path), merged=True)
    scores = [HFRewardModel(str(f), normalise=True).score(PROMPTS, RESPONSES).total for f in (tmp_folder, full)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5)


def test_a_language_model_is_no_reward_model(tiny_llama_path):
    with pytest.raises(UserError, match="no reward model"):
        HFRewardModel(tiny_llama_path).score(PROMPTS, RESPONSES)


def test_a_prompt_that_fills_the_window_is_refused_by_number(reward_path):
    with pytest.raises(UserError, match="prompt 2 alone fills the reward model's window, 8 tokens"):
        HFRewardModel(reward_path, max_length=8).score(["a", "the cat " * 5], ["cat", "dog"])


def lengths(prompts, responses, categories=None):
    return [float(len(r)) + (0 if categories is None else len(categories)) for r in responses]


def short(prompts, responses, categories=None):
    return [1.0]


def infinite(prompts, responses, categories=None):
    return [1.0, float("nan"), 2.0, 3.0]


def nonsense(prompts, responses, categories=None):
    return "high"


@pytest.mark.parametrize("form", ["{}:lengths", "{}.lengths"])
def test_a_function_is_a_scorer(form):
    scorer = FunctionScorer(form.format(__name__))
    assert scorer.score(PROMPTS, RESPONSES).total.tolist() == [10.0, 38.0, 3.0, 34.0]
    assert scorer.score(PROMPTS[:1], RESPONSES[:1], ["chat"]).total.tolist() == [11.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"given 4 responses and returned \(1,\)"),
        ("infinite", "nan for response 2: 'i think"),
        ("nonsense", "str"),
    ],
)
def test_a_function_that_returns_something_else_is_named(name, message):
    with pytest.raises(UserError, match=rf"{name} .*{message}"):
        FunctionScorer(f"{__name__}:{name}").score(PROMPTS, RESPONSES)


@pytest.mark.parametrize("path", ["nowhere.at.all", "math:no_such", "math:pi", "justaname"])
def test_a_path_without_a_function_is_refused(path):
    with pytest.raises(UserError, match=path):
        FunctionScorer(path)


class Fixed(Scorer):
    """Scores that a test writes down."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def score(self, prompts, responses, categories=None) -> Scores:
        return Scores(torch.tensor(self.values))


MEMBERS = [Fixed([1.0, 4.0]), Fixed([3.0, 0.0])]


@pytest.mark.parametrize(
    ("aggregator", "total"),
    [(None, [2.0, 2.0]), (WorstCase(), [1.0, 0.0]), (UncertaintyWeighted(0.5), [1.5, 0.0])],  # variances 1 and 4
)
def test_an_ensemble_aggregates_its_members(aggregator, total):
    scores = Ensemble(MEMBERS, aggregator).score(["a", "b"], ["c", "d"])
    assert scores.total.tolist() == total
    assert scores.members.tolist() == [[1.0, 3.0], [4.0, 0.0]]


def test_scales_put_members_on_one_footing():
    scores = Ensemble(MEMBERS, WorstCase(), scales=[(1.0, 3.0), (0.0, 1.5)]).score(["a", "b"], ["c", "d"])
    assert scores.members.tolist() == [[0.0, 2.0], [1.0, 0.0]]
    assert scores.total.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("scorers", "scales", "message"),
    [([], None, "at least one"), (MEMBERS, [(0.0, 1.0)], "2 scorers"), (MEMBERS, [(0.0, 1.0), (0.0, 0.0)], "std")],
)
def test_an_ensemble_checks_its_arguments(scorers, scales, message):
    with pytest.raises(UserError, match=message):
        Ensemble(scorers, scales=scales)


def test_scorers_are_described_by_plain_arguments_and_built_again(reward_path):
    ensemble = Ensemble(
        [HFRewardModel(reward_path, 2, normalise=True), FunctionScorer(f"{__name__}:lengths")], WorstCase()
    )
    again = build(plain(ensemble), Scorer)
    torch.testing.assert_close(again.score(PROMPTS, RESPONSES).total, ensemble.score(PROMPTS, RESPONSES).total)


def test_scorers_come_from_the_command_line(reward_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--proxy", type=Scorer)
    config = {
        "class_path": "lit_rlhf.models.scorers.Ensemble",
        "init_args": {
            "scorers": [
                {"class_path": "lit_rlhf.models.scorers.HFRewardModel", "init_args": {"path": reward_path}},
                {
                    "class_path": "lit_rlhf.models.scorers.FunctionScorer",
                    "init_args": {"function": f"{__name__}:lengths"},
                },
            ],
            "aggregator": {"class_path": "lit_rlhf.functional.aggregation.WorstCase"},
        },
    }
    scorer = parser.instantiate(parser.parse_object({"proxy": config})).proxy
    assert scorer.score(PROMPTS, RESPONSES).members.shape == (4, 2)
