"""The reward model: pooling, head, scale, LoRA, and folders that plain transformers and peft score alike with."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions
from lit_rlhf.models.reward import RewardModel, last_token
from lit_rlhf.types import Sequences, UserError

LORA = ModelOptions(lora=LoRA(r=4, alpha=8))


def padded(rows: list[list[int]], *, left: bool = False, pad: int = 0) -> Sequences:
    """Rows of ids, padded to one width plus two; masks from lengths."""
    width = max(map(len, rows)) + 2
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), True
    return Sequences(ids, mask, mask)


ROWS = [[5, 9, 7, 12, 0], [8, 6, 11], [14, 13, 10, 9, 9, 5, 0]]  # two end on the end token, 0


@pytest.fixture(params=["llama", "gpt2", "neox"])
def path(request) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_path")


def trained(path: str, options: ModelOptions | None = None) -> RewardModel:
    """A reward model after two steps, so that head and adapters have moved."""
    torch.manual_seed(3)
    model = RewardModel(path, options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(padded(ROWS)).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("mask", "columns"),
    [([[1, 1, 1, 0]], [2]), ([[0, 1, 1, 1]], [3]), ([[0, 0, 1, 0], [1, 0, 0, 0]], [2, 0])],
)
def test_the_last_token_is_found_by_the_mask(mask, columns):
    assert last_token(torch.tensor(mask, dtype=torch.bool)).tolist() == columns


def test_a_score_is_the_head_on_the_last_real_token_under_both_paddings(path):
    model = RewardModel(path)
    for left in (False, True):
        scores = model(padded(ROWS, left=left))
        assert scores.shape == (3,)
        for row, score in zip(ROWS, scores, strict=True):
            hidden = model.classifier.base_model(input_ids=torch.tensor([row])).last_hidden_state
            torch.testing.assert_close(score, model.head(hidden)[0, -1, 0], rtol=0, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(path):
    model = RewardModel(path)
    assert torch.equal(model(padded(ROWS, pad=0)), model(padded(ROWS, pad=17)))


def test_a_new_head_has_the_published_spread(make_model):
    path = make_model("llama", hidden_size=512, num_hidden_layers=1)
    torch.manual_seed(0)
    weight = RewardModel(path).head.weight.detach()
    assert weight.shape == (1, 512)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)  # 512 draws: 3 % standard error


def test_the_body_is_the_folders_and_the_head_follows_the_seed(path):
    torch.manual_seed(1)
    one = RewardModel(path)
    torch.manual_seed(1)
    same = RewardModel(path)
    torch.manual_seed(2)
    other = RewardModel(path)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    source = Backbone(path).causal_lm.base_model.state_dict()
    for name, value in one.classifier.base_model.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_the_head_works_in_float32_whatever_the_body(path):
    model = RewardModel(path, ModelOptions(dtype="bfloat16"))
    assert model.head.weight.dtype == torch.float32
    assert next(model.classifier.base_model.parameters()).dtype == torch.bfloat16
    assert model(padded(ROWS)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = RewardModel(path)(padded(ROWS))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def classifier_folder(path: str, folder, labels: int) -> str:
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels).save_pretrained(folder)
    return str(folder)


def test_a_classifier_of_two_labels_is_refused(tiny_llama_path, tmp_folder):
    with pytest.raises(UserError, match="num_labels=2"):
        RewardModel(classifier_folder(tiny_llama_path, tmp_folder, 2))


def test_a_reward_model_made_elsewhere_keeps_its_head(tiny_llama_path, tmp_folder):
    from transformers import AutoModelForSequenceClassification

    folder = classifier_folder(tiny_llama_path, tmp_folder, 1)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(RewardModel(folder).head.weight, plain.score.weight)


def test_a_model_without_a_score_head_is_refused(make_model, tmp_folder):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_folder)
    with pytest.raises(UserError, match="no linear head called `score`"):
        RewardModel(str(tmp_folder))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_scale_without_spread_is_refused(tiny_llama_path, mean, std):
    with pytest.raises(UserError, match="std positive"):
        RewardModel(tiny_llama_path).set_scale(mean, std)


def test_lora_trains_adapters_and_head_only(path):
    model = RewardModel(path, LORA)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in names)
    assert all("lora_" in name or "score.modules_to_save" in name for name in names)
    model(padded(ROWS)).square().sum().backward()
    assert model.head.weight.grad.any()


@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
def test_activation_checkpointing_changes_no_gradient(tiny_llama_path, lora):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = RewardModel(tiny_llama_path, ModelOptions(activation_checkpointing=checkpointing, lora=lora))
        model(padded(ROWS)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert any(gradient.any() for name, gradient in gradients[1].items() if "score" not in name)


def tokenizer_of(path: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def plain_scores(model, tokenizer) -> torch.Tensor:
    """Score as a stranger would: a right-padded batch, the tokenizer's own padding token."""
    batch = padded(ROWS, pad=tokenizer.pad_token_id)
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch.ids, attention_mask=batch.attention_mask.long()).logits[:, 0]


@pytest.mark.parametrize("options", [ModelOptions(), LORA])
def test_an_exported_folder_scores_alike_in_plain_transformers(path, options, tmp_folder):
    from transformers import AutoModelForSequenceClassification

    model = trained(path, options)
    model.set_scale(-1.5, 0.25)
    scores = model(padded(ROWS)).detach()
    model.export(tmp_folder, tokenizer_of(path), merged=options.lora is not None)
    tokenizer = tokenizer_of(str(tmp_folder))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_folder)
    torch.testing.assert_close(plain_scores(plain, tokenizer), scores, rtol=0, atol=1e-5)
    config = json.loads((tmp_folder / "config.json").read_text())
    assert (config["score_mean"], config["score_std"]) == (-1.5, 0.25)
    again = RewardModel(str(tmp_folder))
    torch.testing.assert_close(again(padded(ROWS)).detach(), scores, rtol=0, atol=1e-5)
    assert (again.score_mean.item(), again.score_std.item()) == (-1.5, 0.25)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_an_exported_adapter_folder_scores_alike_in_plain_peft(path, tmp_folder):
    from peft import AutoPeftModelForSequenceClassification

    model = trained(path, LORA)
    model.set_scale(2.0, 0.5)
    scores = model(padded(ROWS)).detach()
    model.export(tmp_folder, tokenizer_of(path))
    tokenizer = tokenizer_of(str(tmp_folder))
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.testing.assert_close(plain_scores(plain, tokenizer), scores, rtol=0, atol=1e-5)
    again = RewardModel(str(tmp_folder))
    batch = padded(ROWS, pad=tokenizer.pad_token_id)
    torch.testing.assert_close(again(batch).detach(), scores, rtol=0, atol=1e-5)
    assert (again.score_mean.item(), again.score_std.item()) == (2.0, 0.5)
    assert all(p.requires_grad for p in again.parameters())


def test_exporting_leaves_the_model_as_it_was(tiny_gpt2_path, tmp_folder):
    model = trained(tiny_gpt2_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.export(tmp_folder, tokenizer_of(tiny_gpt2_path))
    for name, value in model.state_dict().items():  # the scale is NaN until it is measured
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.classifier.config.vocab_size == before["model.transformer.wte.weight"].shape[0]
