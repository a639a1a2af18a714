"""The policy's body: log-probabilities against plain transformers, padding, LoRA, checkpointing, and folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions, evaluating
from lit_rlhf.models.loading import load_model
from lit_rlhf.types import Sequences, UserError

LORA = ModelOptions(lora=LoRA(r=4, alpha=8))


def rows(*, left: int = 0, right: int = 0, pad: int = 0, seed: int = 1) -> Sequences:
    """Two rows of 4 prompt and 5 or 3 response tokens, padded by `left` and `right` columns of `pad`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 30, (2, 9), generator=generator)
    real, response = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    response[:, 4:] = True
    ids[1, 7:], real[1, 7:], response[1, 7:] = pad, False, False

    def widen(x, value):
        return torch.nn.functional.pad(x, (left, right), value=value)

    return Sequences(widen(ids, pad), widen(real, False), widen(response, False))


def plain_logps(path: str, sequences: Sequences, temperature: float = 1.0) -> torch.Tensor:
    """The same numbers row by row, without padding, by plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    out = torch.zeros(sequences.ids.shape)
    for i, (ids, real, response) in enumerate(
        zip(sequences.ids, sequences.attention_mask, sequences.response_mask, strict=True)
    ):
        logps = (model(ids[real][None]).logits[0] / temperature).log_softmax(-1).detach()
        start = int(real.long().argmax())
        for column in response.nonzero()[:, 0].tolist():
            out[i, column] = logps[column - start - 1, ids[column]]
    return out


@pytest.fixture(params=["llama", "gpt2", "neox"])
def path(request) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_path")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 3), (2, 5)])
def test_logps_are_those_of_plain_transformers_under_any_padding(path, left, right, temperature):
    sequences = rows(left=left, right=right)
    logps = Backbone(path)(sequences, temperature)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, plain_logps(path, sequences, temperature), rtol=0, atol=1e-5)
    assert not logps[~sequences.response_mask].any()


def test_what_stands_in_the_padding_changes_nothing(tiny_gpt2_path):
    backbone = Backbone(tiny_gpt2_path)
    one, other = rows(left=2, right=2, pad=0), rows(left=2, right=2, pad=17)
    assert torch.equal(backbone(one), backbone(other))


def test_an_end_token_in_the_response_counts_where_padding_is_the_same_token(tiny_gpt2_path):
    sequences = rows(pad=0)
    sequences.ids[1, 6] = 0  # the row's last response token is the end token, which is also the padding
    logps = Backbone(tiny_gpt2_path)(sequences)
    assert logps[1, 6] != 0
    torch.testing.assert_close(logps, plain_logps(tiny_gpt2_path, sequences), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "head_path"),
    [
        ("LlamaConfig", {}, "chunked"),
        ("LlamaConfig", {"tie_word_embeddings": True}, "chunked"),
        ("Gemma2Config", {"final_logit_softcapping": 5.0, "head_dim": 8, "num_key_value_heads": 2}, "full"),
        ("CohereConfig", {"logit_scale": 0.25}, "full"),
        ("GraniteConfig", {"logits_scaling": 4.0}, "full"),
        ("PhiConfig", {}, "full"),  # its head has a bias
        ("BloomConfig", {"n_head": 4}, "chunked"),  # takes no position_ids
    ],
)
def test_heads_that_do_more_than_multiply_are_found_and_exact(make_model, family, changes, head_path):
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    path = make_model(config=getattr(transformers, family)(**(ids | shape | changes)))
    backbone, sequences = Backbone(path), rows(right=1)
    assert backbone.head_path == head_path
    torch.testing.assert_close(backbone(sequences, 0.7), plain_logps(path, sequences, 0.7), rtol=0, atol=1e-5)


def test_the_dtype_is_the_one_asked_for_and_not_the_folders(tiny_llama_path, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_llama_path).bfloat16().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama_path).save_pretrained(tmp_path)
    assert {p.dtype for p in Backbone(str(tmp_path)).parameters()} == {torch.float32}
    half = Backbone(str(tmp_path), ModelOptions(dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(rows()).dtype == torch.float32


def test_dropout_is_off_in_train_mode_also_where_it_is_functional(make_model):
    path = make_model("llama", attention_dropout=0.5)
    noisy = make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    for folder in (path, noisy):
        backbone = Backbone(folder).train()
        torch.testing.assert_close(backbone(rows()), plain_logps(folder, rows()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("BioGptConfig", {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "layerdrop": 0.5}),
        ("MptConfig", {"attn_config": {"attn_pdrop": 1}, "resid_pdrop": 0.5}),  # nested, and declared as an integer
    ],
)
def test_dropout_is_off_under_whatever_name(make_model, family, dropout):
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, family)(vocab_size=60, max_position_embeddings=64, **shape, **dropout)
    path = make_model(config=config)
    torch.testing.assert_close(Backbone(path).train()(rows()), plain_logps(path, rows()), rtol=0, atol=1e-5)


def test_dropout_modules_that_no_config_field_sets_are_off_too():
    class Stub:
        @staticmethod
        def from_pretrained(path, **options):
            return torch.nn.Sequential(torch.nn.Dropout(0.5)), {"missing_keys": [], "mismatched_keys": []}

    assert load_model(Stub, "anywhere", ModelOptions(), None)[0].p == 0


def test_a_head_with_a_bias_that_is_still_zero_takes_the_exact_path(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    PhiForCausalLM(PhiConfig(vocab_size=60, **shape)).save_pretrained(tmp_path)
    backbone = Backbone(str(tmp_path))
    assert not backbone.causal_lm.lm_head.bias.any()
    assert backbone.head_path == "full"


def test_missing_weights_are_refused_by_name(tiny_llama_path, tmp_path):
    folder = Path(shutil.copytree(tiny_llama_path, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "layers.1.mlp" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"3 weights are missing .*model\.layers\.1\.mlp"):
        Backbone(str(folder))


def test_weights_of_another_shape_are_refused_by_name(tiny_llama_path, tmp_path):
    folder = Path(shutil.copytree(tiny_llama_path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(UserError, match=r"wrong shape, such as .*weight"):
        Backbone(str(folder))


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama"}')
    cases = {
        str(tmp_path): "holds no model",
        str(tmp_path / "broken"): "holds no model",
        str(tmp_path / "file.txt"): "this is a file",
        str(tmp_path / "absent"): "no such folder",
        "nobody/nothing-of-this-name": "no such model could be fetched",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            Backbone(path)
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_not_run_unasked(tiny_llama_path, tmp_path):
    folder = Path(shutil.copytree(tiny_llama_path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError):
        Backbone(str(folder))
    assert not (tmp_path / "ran").exists()


def step(backbone: Backbone, sequences: Sequences) -> None:
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    (-backbone(sequences).sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_starts_at_the_reference_exactly_and_never_moves_it(kind, request):
    path = request.getfixturevalue(f"tiny_{kind}_path")
    backbone, sequences = Backbone(path, LORA), rows()
    with backbone.adapters_off(), torch.no_grad():
        before = backbone(sequences)
    assert torch.equal(backbone(sequences), before)
    for _ in range(2):  # the first step moves B only, the second A too
        step(backbone, sequences)
    with backbone.adapters_off(), torch.no_grad():
        after = backbone(sequences)
    assert torch.equal(after, before)
    assert not torch.equal(backbone(sequences), before)
    torch.testing.assert_close(before, plain_logps(path, sequences), rtol=0, atol=1e-5)


def test_turning_adapters_off_leaves_their_gradients_on(tiny_llama_path):
    backbone = Backbone(tiny_llama_path, LORA)
    wanted = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert wanted
    assert all("lora_" in name for name in wanted)
    with backbone.adapters_off():
        assert {name for name, p in backbone.named_parameters() if p.requires_grad} == wanted
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == wanted


def test_adapters_come_back_on_after_an_error(tiny_llama_path):
    backbone = Backbone(tiny_llama_path, LORA)
    step(backbone, rows())
    trained = backbone(rows())
    with pytest.raises(RuntimeError), backbone.adapters_off():
        raise RuntimeError
    assert torch.equal(backbone(rows()), trained)


def test_a_model_without_adapters_has_none_to_turn_off(tiny_llama_path):
    with pytest.raises(UserError, match="no LoRA adapters"), Backbone(tiny_llama_path).adapters_off():
        pass


def kept_for_backward(backbone: Backbone) -> int:
    """Run a backward pass and count the numbers that the forward pass kept for it."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = -backbone(rows()).sum()
    loss.backward()
    return sum(kept)


@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
def test_activation_checkpointing_changes_no_gradient(tiny_llama_path, lora):
    gradients, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(tiny_llama_path, ModelOptions(activation_checkpointing=checkpointing, lora=lora)).train()
        saved.append(kept_for_backward(backbone))
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.requires_grad})
    without, recomputed = gradients
    assert saved[1] < saved[0] / 2
    for name, gradient in without.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
        assert "lora_A" in name or gradient.any()  # B starts at zero, so A has no gradient yet


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), ".*lm_head"])
def test_lora_on_the_output_head_is_refused(tiny_llama_path, targets):
    with pytest.raises(UserError, match="output head"):
        Backbone(tiny_llama_path, ModelOptions(lora=LoRA(target_modules=targets)))


def test_lora_that_matches_nothing_is_refused(tiny_llama_path):
    with pytest.raises(UserError, match=r"lora\.target_modules=\['nothing'\]"):
        Backbone(tiny_llama_path, ModelOptions(lora=LoRA(target_modules=("nothing",))))


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_lora_checks_its_ranges(field, value):
    with pytest.raises(UserError, match=f"lora.{field}"):
        LoRA(**{field: value})


def tokenizer_of(path: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("options", "merged"), [(ModelOptions(), False), (LORA, True), (LORA, False)])
def test_an_exported_folder_is_the_trained_policy_to_everyone(kind, options, merged, request, tmp_folder):
    path = request.getfixturevalue(f"tiny_{kind}_path")
    backbone, sequences = Backbone(path, options), rows()
    for _ in range(2):
        step(backbone, sequences)
    backbone.export(tmp_folder, tokenizer_of(path), merged=merged)
    trained = backbone(sequences).detach()
    torch.testing.assert_close(plain_logps(str(tmp_folder), sequences), trained, rtol=0, atol=1e-5)
    again = Backbone(str(tmp_folder))
    torch.testing.assert_close(again(sequences).detach(), trained, rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in again.parameters())
    assert tokenizer_of(str(tmp_folder)).eos_token == tokenizer_of(path).eos_token
    assert (tmp_folder / "adapter_config.json").exists() == (options.lora is not None and not merged)


def test_a_lora_policy_trained_on_an_adapter_folder_has_that_adapter_in_its_reference(tiny_llama_path, tmp_folder):
    first, sequences = Backbone(tiny_llama_path, LORA), rows()
    step(first, sequences)
    first.export(tmp_folder, tokenizer_of(tiny_llama_path))
    second = Backbone(str(tmp_folder), LORA)
    with second.adapters_off():
        reference = second(sequences)
    torch.testing.assert_close(reference, first(sequences), rtol=0, atol=1e-5)


def test_evaluating_gives_each_part_its_own_mode_back():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    module.train()
    module[1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert (module.training, module[0].training, module[1].training, module[1][0].training) == (
        True,
        True,
        False,
        False,
    )
