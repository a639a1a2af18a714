"""Stacked experts equal peft's adapters one at a time: scores, gradients, folders, and the seeds they start from."""

from __future__ import annotations

import pytest
import torch

from lit_rlhf.models.backbone import LoRA, ModelOptions
from lit_rlhf.models.expert_folders import ExpertFolder, read_experts, write_experts
from lit_rlhf.models.experts import ExpertBody, ExpertLinear
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.models.scorers import HFRewardModel
from lit_rlhf.types import Sequences, UserError
from tests.models.test_reward import ROWS, padded, plain_scores, tokenizer_of

E = 5
LORA = ModelOptions(lora=LoRA(r=4, alpha=12))


@pytest.fixture(params=["llama", "gpt2", "neox"])
def path(request) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_path")


def moved(path: str, options: ModelOptions = LORA, experts: int = E) -> ExpertBody:
    """Experts that say something: B drawn too."""
    body = ExpertBody(path, options, experts)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in body.expert_layers.values():
            layer.B.copy_(0.2 * torch.randn(layer.B.shape, generator=generator))
    return body


def each(count: int) -> torch.Tensor:
    """One group an expert."""
    return torch.arange(count)[:, None]


def repeated(sequences: Sequences, times: int) -> Sequences:
    return Sequences(*(t.repeat(times, 1) for t in (sequences.ids, sequences.attention_mask, sequences.response_mask)))


def by_peft(body: ExpertBody, slots: tuple[int, ...]) -> RewardModel:
    """Build peft's own model of a sum of experts, filled by hand."""
    lora = body.options.lora
    model = RewardModel(body.path, ModelOptions(lora=LoRA(r=lora.r * len(slots), alpha=lora.alpha * len(slots))))
    for name, layer in body.expert_layers.items():
        adapter = model.classifier.base_model.get_submodule(name)
        adapter.lora_A["default"].weight.data = torch.cat([layer.A.data[s].T for s in slots])
        adapter.lora_B["default"].weight.data = torch.cat([layer.B.data[s].T for s in slots], 1)
    return model


def states_by_peft(model: RewardModel, sequences: Sequences) -> torch.Tensor:
    """Last hidden states of real tokens, row by row, without padding."""
    rows = [ids[mask] for ids, mask in zip(sequences.ids, sequences.attention_mask, strict=True)]
    return torch.stack([model.classifier.base_model(input_ids=row[None]).last_hidden_state[0, -1] for row in rows])


def test_one_batched_pass_equals_a_peft_pass_for_each_expert(path):
    body = moved(path)
    singles = [by_peft(body, (slot,)) for slot in range(E)]
    weights = torch.randn(E * len(ROWS), body.width, generator=torch.Generator().manual_seed(1))
    states = body(repeated(padded(ROWS), E), each(E))
    expected = torch.cat([states_by_peft(model, padded(ROWS)) for model in singles])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert (states[: len(ROWS)] - states[len(ROWS) : 2 * len(ROWS)]).abs().max() > 1e-2
    (states * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, layer in body.expert_layers.items():
        for slot, model in enumerate(singles):
            adapter = model.classifier.base_model.get_submodule(name)
            for ours, theirs in ((layer.A, adapter.lora_A), (layer.B, adapter.lora_B)):
                gradient = theirs["default"].weight.grad.T
                largest = gradient.abs().max()
                assert largest > 0, name
                # float32 sums in another order: rounding is of the matrix's size, not of the entry's
                assert (ours.grad[slot] - gradient).abs().max() < 1e-5 * largest, name


def test_rows_may_use_sums_of_experts_each_its_own(path):
    body = moved(path)
    slots = [(0, 3), (4, 1), (2, 2)]
    states = body(padded(ROWS), torch.tensor(slots))
    for row, (state, pair) in enumerate(zip(states, slots, strict=True)):
        expected = states_by_peft(by_peft(body, pair), padded(ROWS[row : row + 1]))
        torch.testing.assert_close(state[None], expected, rtol=0, atol=1e-5)


def test_without_slots_the_body_runs_alone_and_new_experts_change_nothing(path):
    body, plain = ExpertBody(path, LORA, E), ExpertBody(path)
    alone = plain(padded(ROWS))
    assert torch.equal(moved(path)(padded(ROWS)), alone)
    torch.testing.assert_close(body(padded(ROWS), each(3)), alone, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for n, p in body.named_parameters() if n.rpartition(".")[2] not in ("A", "B"))
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_state(path, left):
    body = moved(path)
    alone = torch.cat([body(padded([row]), torch.tensor([[2]])) for row in ROWS])
    batch = padded(ROWS, left=left, pad=17)
    torch.testing.assert_close(body(batch, torch.tensor([[2]])), alone, rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only_and_is_drawn_for_each_row(tiny_llama_path):
    body = moved(tiny_llama_path, ModelOptions(lora=LoRA(r=4, dropout=0.5)))
    row = padded([ROWS[0]] * 4)
    slots = torch.tensor([[1]])
    body.eval()
    assert torch.equal(body(row, slots), body(row, slots))
    body.train()
    trained = body(row, slots)
    assert not torch.equal(trained, body(row, slots))
    assert not torch.equal(trained[0], trained[1])


def test_dropout_keeps_the_expected_update():
    body = ExpertLinear(torch.nn.Linear(64, 3), 1, LoRA(r=2, alpha=2, dropout=0.25), routing=_routing([[0]]))
    body.draw(0, torch.Generator().manual_seed(0))
    torch.nn.init.ones_(body.B)
    torch.manual_seed(0)
    x = torch.rand(1, 20_000, 64)[:, :1].expand(1, 20_000, 64)
    mean = body(x)[0].mean(0)
    exact = body.eval()(x)[0, 0]
    torch.testing.assert_close(mean, exact, rtol=0, atol=5e-3)


def _routing(slots):
    from lit_rlhf.models.experts import Routing

    routing = Routing()
    routing.slots = torch.tensor(slots)
    return routing


def test_an_update_by_hand():
    base = torch.nn.Linear(2, 1, bias=False)
    layer = ExpertLinear(base, 2, LoRA(r=1, alpha=3), _routing([[1], [0]]))
    base.weight.data = torch.tensor([[10.0, 100.0]])
    layer.A.data = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    layer.B.data = torch.tensor([[[5.0]], [[7.0]]])
    # row 0, expert 1: 10 + 3 * (1 * 3) * 7;  row 1, expert 0: 100 + 3 * (1 * 2) * 5
    assert layer(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).flatten().tolist() == [73.0, 130.0]


def test_an_expert_starts_the_same_whoever_stands_beside_it(tiny_llama_path):
    together = ExpertBody(tiny_llama_path, LORA, E, seed=3)
    alone = ExpertBody(tiny_llama_path, LORA, [3], seed=3)
    other = ExpertBody(tiny_llama_path, LORA, [3], seed=4)
    for name, layer in together.expert_layers.items():
        assert torch.equal(layer.A[3], alone.expert_layers[name].A[0])
        assert not torch.equal(layer.A[3], other.expert_layers[name].A[0])
        assert not torch.equal(layer.A[3], layer.A[2])
        assert not layer.B.any()
        bound = layer.A.shape[1] ** -0.5
        assert 0.9 * bound < layer.A.abs().max() <= bound
    assert torch.equal(together.new_head(3).weight, alone.new_head(3).weight)
    assert not torch.equal(together.new_head(3).weight, together.new_head(2).weight)


def test_building_experts_starts_as_peft_does(tiny_llama_path):
    spread = [
        torch.cat([p.flatten() for n, p in model.named_parameters() if key in n]).std().item()
        for model, key in ((ExpertBody(tiny_llama_path, LORA, E), ".A"), (RewardModel(tiny_llama_path, LORA), "lora_A"))
    ]
    assert spread[0] == pytest.approx(spread[1], rel=0.05)


def test_a_reward_models_head_is_kept_and_copied(tiny_llama_path, tmp_folder):
    model = RewardModel(tiny_llama_path)
    model.export(tmp_folder, tokenizer_of(tiny_llama_path))
    body = ExpertBody(str(tmp_folder), LORA, 2)
    first, second = body.new_head(0), body.new_head(1)
    assert torch.equal(first.weight, model.head.weight)
    assert first.weight is not second.weight


def test_activation_checkpointing_recomputes_with_the_same_experts(path):
    gradients = []
    for checkpointing in (False, True):
        body = moved(path, ModelOptions(activation_checkpointing=checkpointing, lora=LORA.lora))
        # two passes before the backward: each layer must remember the slots of its own
        loss = body(padded(ROWS), torch.tensor([[1]])).sum() + 2 * body(padded(ROWS), torch.tensor([[4]])).sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in body.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient[[1, 4]].any(-1).any(-1).all() or name.endswith("A")
        assert not gradient[[0, 2, 3]].any()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("slots", [(3,), (3, 1)])
def test_a_written_expert_scores_alike_in_plain_peft_and_here(path, slots, tmp_folder):
    from peft import AutoPeftModelForSequenceClassification

    body = moved(path)
    head = body.new_head(3)
    scores = head(body(padded(ROWS), torch.tensor([slots]))).detach()[:, 0]
    tokenizer = tokenizer_of(path)
    write_experts(body, [ExpertFolder(tmp_folder, head, slots, 2.0, 0.5)], tokenizer)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.testing.assert_close(plain_scores(plain, tokenizer), scores, rtol=0, atol=1e-5)
    again = RewardModel(str(tmp_folder), fresh_head=False)
    torch.testing.assert_close(again(padded(ROWS, pad=tokenizer.pad_token_id)).detach(), scores, rtol=0, atol=1e-5)
    assert (again.score_mean.item(), again.score_std.item()) == (2.0, 0.5)


def test_experts_on_an_adapter_folder_are_written_whole(tiny_llama_path, tmp_path):
    tokenizer = tokenizer_of(tiny_llama_path)
    first = moved(tiny_llama_path)
    write_experts(first, [ExpertFolder(tmp_path / "first", first.new_head(0), (0,))], tokenizer)
    second = moved(str(tmp_path / "first"))
    write_experts(second, [ExpertFolder(tmp_path / "second", second.new_head(1), (1,))], tokenizer)
    scores = second.new_head(1)(second(padded(ROWS), torch.tensor([[1]])))[:, 0]
    again = RewardModel(str(tmp_path / "second"), fresh_head=False)
    torch.testing.assert_close(again(padded(ROWS)), scores, rtol=0, atol=1e-5)


def test_written_experts_are_read_back_as_they_were(path, tmp_path):
    body = moved(path)
    items = [ExpertFolder(tmp_path / f"e{s}", body.new_head(s), (s,), float(s), 0.5 + s) for s in range(E)]
    write_experts(body, items, tokenizer_of(path))
    again, found = read_experts([item.folder for item in items], ModelOptions())
    batch = repeated(padded(ROWS), E)
    assert torch.equal(again(batch, each(E)), body(batch, each(E)))
    for before, after in zip(items, found, strict=True):
        assert torch.equal(before.head.weight, after.head.weight)
        assert (after.slots, after.mean, after.std) == (before.slots, before.mean, before.std)
    tokenizer = tokenizer_of(str(items[0].folder))
    assert again.transformer.get_input_embeddings().num_embeddings > tokenizer.pad_token_id


def test_adapters_that_differ_are_no_experts_of_one_body(tiny_llama_path, tmp_path):
    tokenizer = tokenizer_of(tiny_llama_path)
    for rank in (2, 4):
        RewardModel(tiny_llama_path, ModelOptions(lora=LoRA(r=rank))).export(tmp_path / f"r{rank}", tokenizer)
    with pytest.raises(UserError, match=r"r4.*r=4.*r=2"):
        read_experts([tmp_path / "r2", tmp_path / "r4"], ModelOptions())
    with pytest.raises(UserError, match="holds no LoRA reward model"):
        read_experts([tmp_path], ModelOptions())


def test_wrong_options_are_refused(tiny_llama_path):
    with pytest.raises(UserError, match="2 LoRA experts with lora=None"):
        ExpertBody(tiny_llama_path, ModelOptions(), 2)
    with pytest.raises(UserError, match="0 LoRA experts with lora=LoRA"):
        ExpertBody(tiny_llama_path, LORA)
    with pytest.raises(UserError, match=r"embed_tokens is no linear layer"):
        ExpertBody(tiny_llama_path, ModelOptions(lora=LoRA(target_modules=("embed_tokens",))), 2)
    with pytest.raises(ValueError, match="3 rows cannot form 2 equal groups"):
        ExpertBody(tiny_llama_path, LORA, 2)(padded(ROWS), each(2))


def test_a_half_precision_body_keeps_its_experts_in_float32(tiny_llama_path, tmp_folder):
    body = ExpertBody(tiny_llama_path, ModelOptions(dtype="bfloat16", lora=LORA.lora), 2)
    assert {p.dtype for p in body.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in body.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert body(padded(ROWS), torch.tensor([[1]])).dtype == torch.float32


def test_an_expert_folder_is_an_ordinary_scorer(tmp_folder):
    body = moved("builtin:policy", experts=2)
    head = body.new_head(1)
    write_experts(body, [ExpertFolder(tmp_folder, head, (1,))], tokenizer_of(body.path))
    scorer = HFRewardModel(str(tmp_folder))
    prompts, responses = ["one", "two"], ["a b c", "d"]
    found = scorer.score(prompts, responses).total
    _, encoder = scorer._load()
    batch = encoder.collate(encoder.encode_many(prompts, responses))
    expected = head(body(batch, torch.tensor([[1]])))[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
