"""DMoERM's body: each row by its own experts, heads that learn, and folders that other programs load."""

from __future__ import annotations

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch

from lit_rlhf.encoding import Encoder
from lit_rlhf.functional.aggregation import Mean, WorstCase
from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions
from lit_rlhf.models.moe import MoE, select
from lit_rlhf.models.moe_folders import fill_moe, read_moe, write_moe
from lit_rlhf.models.moe_scorer import MoERewardModel, explain, gate_of, gated_logit, score_rows
from lit_rlhf.models.reward import RewardModel, load
from lit_rlhf.models.router import Router, RouterModel
from lit_rlhf.types import Sequences, UserError

POINTS = {"ask": ("calm", "wit"), "tell": ("art", "calm", "wit")}
OPTIONS = ModelOptions(lora=LoRA(r=2, alpha=4))
ROWS = [[5, 9, 7, 12, 0], [8, 6, 11], [14, 13, 10, 9, 9, 5, 0], [7, 7, 9]]
CATEGORY = torch.tensor([0, 1, 1, 0])


def padded(rows, *, left=False, pad=0) -> Sequences:
    width = max(map(len, rows)) + 2
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), True
    return Sequences(ids, mask, mask)


def moved(path, form="shared", options=OPTIONS) -> MoE:
    """A model whose adapters and heads all differ from their start."""
    moe = MoE(path, POINTS, options, form=form)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if form == "backbones" or not name.startswith("bodies.") or name.endswith((".A", ".B")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for buffer in (moe.score_mean, moe.point_mean):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        for buffer in (moe.score_std, moe.point_std):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return moe


@pytest.fixture(params=["shared", "backbones"])
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama_path)


# -- states -----------------------------------------------------------------------------------------------------------


def test_untrained_experts_leave_the_pretrained_body_as_it_is(tiny_llama_path, form):
    moe = MoE(tiny_llama_path, POINTS, OPTIONS, form=form)
    source = Backbone(tiny_llama_path).causal_lm.base_model
    states = moe.states(padded(ROWS), CATEGORY)
    assert states.shape == (4, 3, 32)
    for i, row in enumerate(ROWS):
        expected = source(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
        for k in range(len(POINTS[moe.categories[CATEGORY[i]]])):
            torch.testing.assert_close(states[i, k], expected, rtol=0, atol=1e-5)
    assert not states[0, 2].any()  # "ask" has two points


def test_a_rows_state_is_the_last_real_tokens_under_both_paddings_and_alone(tiny_llama_path, form):
    moe = moved(tiny_llama_path, form)
    right = moe.states(padded(ROWS), CATEGORY)
    for other in (padded(ROWS, left=True), padded(ROWS, pad=17)):
        torch.testing.assert_close(moe.states(other, CATEGORY), right, rtol=0, atol=1e-5)
    for i, row in enumerate(ROWS):
        alone = moe.states(padded([row]), CATEGORY[i : i + 1])
        torch.testing.assert_close(alone[0], right[i], rtol=0, atol=1e-5)


def test_category_and_point_both_matter(tiny_llama_path, form):
    moe = moved(tiny_llama_path, form)
    row = padded([ROWS[0]] * 2)
    by_category = moe.task(row, torch.tensor([0, 1]))
    assert abs(by_category[0] - by_category[1]) > 1e-4
    by_point = moe.point(row, torch.tensor([1, 1]), torch.tensor([0, 2]))
    assert abs(by_point[0] - by_point[1]) > 1e-4
    states = moe.states(padded(ROWS), CATEGORY)
    scores = moe.point_scores(states, CATEGORY)
    for i, c in enumerate(CATEGORY.tolist()):
        for k in range(3):
            if k < len(POINTS[moe.categories[c]]):
                one = moe.point(padded([ROWS[i]]), torch.tensor([c]), torch.tensor([k]))
                torch.testing.assert_close(one[0], scores[i, k], rtol=0, atol=1e-5)
            else:
                assert scores[i, k].isnan()


def test_the_mixture_is_linear_prelu_linear_on_the_points_states_alone(tiny_llama_path):
    moe = moved(tiny_llama_path)
    with torch.no_grad():
        states = moe.states(padded(ROWS), CATEGORY)
        found = moe.mixture(states, CATEGORY)
    for i, c in enumerate(CATEGORY.tolist()):
        k = len(POINTS[moe.categories[c]])
        first, prelu, last = moe.mixtures[c]
        assert (first.in_features, first.out_features, last.out_features) == (k * 32, 32, 1)
        w1, b1, a, w2, b2 = (
            p.detach().double().numpy() for p in (*first.parameters(), prelu.weight, *last.parameters())
        )
        z = states[i, :k].double().numpy().reshape(-1)
        y = w1 @ z + b1
        y = np.where(y > 0, y, a * y)
        assert found[i].item() == pytest.approx((w2 @ y + b2).item(), abs=1e-5)


def test_the_order_of_points_belongs_to_the_mixture(tiny_llama_path):
    moe = moved(tiny_llama_path)
    states = moe.states(padded(ROWS), CATEGORY)
    swapped = states.clone()
    swapped[:, [0, 1]] = states[:, [1, 0]]
    assert (moe.mixture(swapped, CATEGORY) - moe.mixture(states, CATEGORY)).abs().min() > 1e-5


def test_inner_words_choose_the_score(tiny_llama_path, form):
    moe = moved(tiny_llama_path, form)
    batch = padded(ROWS)
    states = moe.states(batch, CATEGORY)
    points = moe.point_scores(states, CATEGORY)
    assert moe.score(batch, CATEGORY, "none")[1] is None
    torch.testing.assert_close(moe.score(batch, CATEGORY, "none")[0], moe.task(batch, CATEGORY))
    expected = torch.stack([points[i, : len(POINTS[moe.categories[c]])].mean() for i, c in enumerate(CATEGORY)])
    torch.testing.assert_close(moe.score(batch, CATEGORY, "mean")[0], expected)
    torch.testing.assert_close(moe.score(batch, CATEGORY, "mixture")[0], moe.mixture(states, CATEGORY))


# -- what learns ------------------------------------------------------------------------------------------------------


def test_each_head_is_registered_and_gets_a_gradient(tiny_llama_path, form):
    moe = moved(tiny_llama_path, form)
    names = dict(moe.named_parameters())
    assert sum(name.startswith("point_heads") for name in names) == 5
    rows = padded([ROWS[0]] * 5)
    moe.point(rows, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2])).sum().backward()
    assert all(head.weight.grad.any() for head in moe.point_heads)
    assert all(head.weight.grad is None for head in moe.task_heads)
    moe.task(rows, torch.tensor([0, 0, 1, 1, 1])).sum().backward()
    assert all(head.weight.grad.any() for head in moe.task_heads)


def test_the_points_heads_start_as_copies_of_their_categorys(tiny_llama_path):
    moe = moved(tiny_llama_path)
    moe.copy_heads()
    for head, c in zip(moe.point_heads, (0, 0, 1, 1, 1), strict=True):
        assert torch.equal(head.weight, moe.task_heads[c].weight)
        assert head.weight is not moe.task_heads[c].weight


@pytest.mark.parametrize("name", ["adamw", "adam", "rmsprop", "sgd"])
def test_experts_of_other_phases_keep_every_bit(tiny_llama_path, name):
    from lit_rlhf.modules.optimizer import Optimizer

    moe = moved(tiny_llama_path)
    optimizer = Optimizer(name=name, lr=0.1).build(p for p in moe.parameters() if p.requires_grad)
    before = [p.detach().clone() for p in moe.experts()]
    for _ in range(2):
        optimizer.zero_grad()
        moe.mixture(moe.states(padded(ROWS), CATEGORY), CATEGORY).sum().backward()
        moe.keep_experts(categories=True)
        optimizer.step()
    for old, new in zip(before, moe.experts(), strict=True):
        assert torch.equal(old[:2], new[:2])
        assert (old[2:] != new[2:]).any(-1).any(-1).all()


def test_frozen_names_are_the_pretrained_weights_of_the_shared_form(tiny_llama_path):
    moe = MoE(tiny_llama_path, POINTS, OPTIONS)
    assert moe.frozen() == {name for name, p in moe.named_parameters() if not p.requires_grad}
    assert MoE(tiny_llama_path, POINTS, OPTIONS, form="backbones").frozen() == set()


def test_the_papers_bodies_learn_in_phase_1_alone(tiny_llama_path):
    moe = MoE(tiny_llama_path, POINTS, OPTIONS, form="backbones")
    assert len(moe.bodies) == 2
    for trained in (True, False):
        moe.zero_grad()
        moe.train_bodies(trained=trained)
        scores = moe.task(padded(ROWS), CATEGORY) if trained else moe.point(padded(ROWS), CATEGORY, CATEGORY * 0)
        scores.sum().backward()
        touched = {name.endswith((".A", ".B")) for name, p in moe.bodies.named_parameters() if p.grad is not None}
        assert touched == {not trained}


def test_the_seed_rules_adapters_heads_and_mixtures(tiny_llama_path):
    one, same, other = (MoE(tiny_llama_path, POINTS, OPTIONS, seed=seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if name.endswith(".A") or "heads" in name or (name.startswith("mixtures") and a.ndim == 2):
            assert not torch.equal(a, c), name


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tiny_llama_path, form, tokenizer, tmp_folder):
    moe = moved(tiny_llama_path, form)
    write_moe(moe, tmp_folder, tokenizer, inner="mixture")
    return moe, tmp_folder


def test_a_folder_read_back_scores_alike(written):
    moe, folder = written
    again = read_moe(folder)
    assert again.points == POINTS
    for inner in ("none", "mean", "mixture"):
        for a, b in zip(
            moe.score(padded(ROWS), CATEGORY, inner), again.score(padded(ROWS), CATEGORY, inner), strict=True
        ):
            assert (a is None and b is None) or torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    for name in ("score_mean", "score_std", "point_mean", "point_std"):
        torch.testing.assert_close(getattr(again, name), getattr(moe, name))


def test_each_part_is_an_ordinary_reward_model(written):
    moe, folder = written
    for c in (0, 1):
        plain = RewardModel(str(folder / f"category-{c}"), fresh_head=False)
        expected = moe.task(padded(ROWS), torch.full((4,), c))
        torch.testing.assert_close(plain(padded(ROWS)), expected, rtol=0, atol=1e-5)
        point = RewardModel(str(folder / f"category-{c}" / "point-1"), fresh_head=False)
        expected = moe.point(padded(ROWS), torch.full((4,), c), torch.ones(4, dtype=torch.long))
        torch.testing.assert_close(point(padded(ROWS)), expected, rtol=0, atol=1e-5)


def test_what_was_not_trained_is_not_written(tiny_llama_path, tokenizer, tmp_folder):
    moe = moved(tiny_llama_path)
    write_moe(moe, tmp_folder, tokenizer, inner="none", phases=["task"])
    assert not (tmp_folder / "category-0" / "point-0").exists()
    assert not (tmp_folder / "category-0" / "mixture.safetensors").exists()
    fresh = MoE(tiny_llama_path, POINTS, OPTIONS)
    assert fill_moe(fresh, tmp_folder) == ["task"]
    assert torch.equal(fresh.task(padded(ROWS), CATEGORY), moe.task(padded(ROWS), CATEGORY))


def test_categories_without_points_have_their_own_score_alone(tiny_llama_path, form, tokenizer, tmp_folder):
    bare = {"ask": (), "tell": POINTS["tell"]}
    moe = MoE(tiny_llama_path, bare, OPTIONS, form=form)
    scores = moe.task(padded(ROWS), CATEGORY)
    write_moe(moe, tmp_folder, tokenizer, inner="none", phases=["task"])
    fresh = MoE(tiny_llama_path, bare, OPTIONS, form=form, seed=5)
    assert not torch.equal(fresh.task(padded(ROWS), CATEGORY), scores)
    fill_moe(fresh, tmp_folder)
    assert torch.equal(fresh.task(padded(ROWS), CATEGORY), scores)


def test_a_folder_of_other_points_or_another_order_is_refused(written, tiny_llama_path):
    _, folder = written
    form = json.loads((folder / "reward.json").read_text())["body"]
    for points in ({"ask": ("wit", "calm"), "tell": POINTS["tell"]}, dict(reversed(POINTS.items()))):
        with pytest.raises(UserError, match="expected form"):
            fill_moe(MoE(tiny_llama_path, points, OPTIONS, form=form), folder)
    for lora, message in (
        (LoRA(r=3, alpha=4), "rank 2, expected 3"),
        (LoRA(r=2, alpha=8), "alpha 4, expected 8"),
        (LoRA(r=2, alpha=4, target_modules=("q_proj",)), "target_modules all-linear, expected .'q_proj'"),
    ):
        with pytest.raises(UserError, match=message):
            fill_moe(MoE(tiny_llama_path, POINTS, ModelOptions(lora=lora), form=form), folder)


def test_a_folder_on_another_model_is_refused(written, tiny_llama_path, tmp_path):
    """Shared adapters mean nothing on another base; bodies of another width do not fit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    moe, folder = written
    narrow = AutoConfig.from_pretrained(tiny_llama_path)
    narrow.hidden_size = 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(narrow).save_pretrained(tmp_path / "narrow")
    other = MoE(str(tmp_path / "narrow"), POINTS, OPTIONS, form=moe.form)
    message = (
        "stands on the model .*expected .*narrow" if moe.form == "shared" else r"has shape .40, 32., expected .40, 16."
    )
    with pytest.raises(UserError, match=message):
        fill_moe(other, folder)


def test_a_moved_folder_still_loads(tiny_llama_path, form, tokenizer, tmp_path):
    """The paper's form needs nothing but itself; the shared one its base, which may be named in another way."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_path, base)
    moe = moved(str(base), form)
    write_moe(moe, tmp_path / "first", tokenizer, inner="mixture", settings={"max_length": 32})
    expected = moe.score(padded(ROWS), CATEGORY, "mixture")[0]
    shutil.move(tmp_path / "first", tmp_path / "second")
    if form == "backbones":
        shutil.rmtree(base)
    again = read_moe(tmp_path / "second")
    assert torch.equal(again.score(padded(ROWS), CATEGORY, "mixture")[0], expected)
    if form == "shared":
        assert fill_moe(MoE(f"{base}/../base", POINTS, OPTIONS), tmp_path / "second")


def test_a_model_of_the_package_is_named_so_on_every_machine(tmp_path):
    from transformers import AutoTokenizer

    from lit_rlhf.assets import resolve

    moe = MoE("builtin:policy", {"ask": ("wit",)}, OPTIONS)
    write_moe(moe, tmp_path, AutoTokenizer.from_pretrained(resolve("builtin:policy")), inner="mixture")
    assert json.loads((tmp_path / "reward.json").read_text())["base"] == "builtin:policy"
    assert read_moe(tmp_path).path == resolve("builtin:policy")


# -- the scorer -------------------------------------------------------------------------------------------------------

PROMPTS = ["who ran", "please tell me more", "tell me", "who sat"]
ANSWERS = ["the cat", "a bird sang", "no", "the cat and a dog"]
LISTED = ["ask", "tell", "tell", "ask"]


@pytest.fixture
def routed(tiny_llama_path, tokenizer, tmp_folder):
    """A DMoERM folder with a router that knows its categories in another order."""
    moe = moved(tiny_llama_path)
    torch.manual_seed(5)
    router = RouterModel(tiny_llama_path, ["tell", "ask"])
    write_moe(moe, tmp_folder, tokenizer, inner="mixture", router=router, settings={"joiner": " ", "max_length": 32})
    return moe.eval(), router.eval(), tmp_folder


def test_scores_are_routed_and_brought_to_one_scale(routed, tiny_llama_path):
    moe, _, folder = routed
    encoder = Encoder.from_pretrained(tiny_llama_path, max_length=32)
    scorer = load(str(folder), routing="oracle")
    assert isinstance(scorer, MoERewardModel)
    found = scorer.score(PROMPTS, ANSWERS, LISTED)
    for i, c in enumerate([0, 1, 1, 0]):
        row = encoder.collate([encoder.encode(PROMPTS[i], ANSWERS[i])])
        raw, points = moe.score(row, torch.tensor([c]), "mixture")
        expected = (raw[0] - moe.score_mean[2, c]) / moe.score_std[2, c]
        torch.testing.assert_close(found.total[i], expected, rtol=0, atol=1e-5)
        names = POINTS[LISTED[i]]
        z = (points[0, : len(names)] - moe.point_mean[[0, 2][c] :][: len(names)]) / moe.point_std[[0, 2][c] :][
            : len(names)
        ]
        for name in ("art", "calm", "wit"):
            if name in names:
                torch.testing.assert_close(found.parts[name][i], z[names.index(name)], rtol=0, atol=1e-5)
            else:
                assert found.parts[name][i].isnan()
        torch.testing.assert_close(found.parts["spread"][i], z.std(correction=0), rtol=0, atol=1e-5)


def test_the_router_decides_whatever_the_rows_say(routed):
    _, _, folder = routed
    choice = Router(str(folder / "router")).route(PROMPTS)
    scorer = MoERewardModel(str(folder))
    expected = MoERewardModel(str(folder), routing="oracle").score(PROMPTS, ANSWERS, choice).total
    wrong = [{"ask": "tell", "tell": "ask"}[name] for name in choice]
    torch.testing.assert_close(scorer.score(PROMPTS, ANSWERS, wrong).total, expected)
    unlisted = MoERewardModel(str(folder), routing="oracle").score(PROMPTS, ANSWERS, [None] * 4).total
    torch.testing.assert_close(unlisted, expected)


def test_soft_routing_weighs_two_standardised_scores(routed):
    _, _, folder = routed
    probabilities = Router(str(folder / "router")).probabilities(PROMPTS)  # tell, ask
    oracle = MoERewardModel(str(folder), routing="oracle")
    both = [oracle.score(PROMPTS, ANSWERS, [name] * 4).total for name in ("tell", "ask")]
    expected = probabilities[:, 0] * both[0] + probabilities[:, 1] * both[1]
    found = MoERewardModel(str(folder), routing="soft").score(PROMPTS, ANSWERS).total
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_soft_routing_needs_one_scale(routed):
    _, _, folder = routed
    described = json.loads((folder / "reward.json").read_text())
    described["categories"][1]["mean"]["mixture"], described["categories"][1]["std"]["mixture"] = 0.0, 1.0
    (folder / "reward.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="never brought to one scale"):
        MoERewardModel(str(folder), routing="soft")
    assert MoERewardModel(str(folder)).score(PROMPTS, ANSWERS).total.isfinite().all()


def test_a_question_is_cut_to_the_window_of_training(routed):
    _, _, folder = routed
    long = ["who " * 40 + "please tell me", "who ran " * 30]  # the folder's window is 32 tokens
    gate = MoERewardModel(str(folder), routing="soft")._gate(long, [None, None])
    expected = Router(str(folder / "router"), max_length=32).probabilities(long)[:, [1, 0]]
    torch.testing.assert_close(gate, expected, rtol=0, atol=1e-6)
    assert (gate - Router(str(folder / "router")).probabilities(long)[:, [1, 0]]).abs().max() > 1e-3


def test_an_aggregator_takes_the_points_of_each_category(routed):
    _, _, folder = routed
    plain = MoERewardModel(str(folder), routing="oracle").score(PROMPTS, ANSWERS, LISTED)
    parts = torch.stack([plain.parts[name] for name in ("art", "calm", "wit")], 1)
    worst = MoERewardModel(str(folder), "oracle", WorstCase()).score(PROMPTS, ANSWERS, LISTED).total
    mean = MoERewardModel(str(folder), "oracle", Mean()).score(PROMPTS, ANSWERS, LISTED).total
    torch.testing.assert_close(worst, parts.nan_to_num(nan=1e9).amin(1))
    torch.testing.assert_close(mean, parts.nanmean(1))


def test_gates_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    names = ["a", "b", "c"]
    assert gate_of(p, [None, None], names, "router").tolist() == [[1, 0, 0], [0, 0, 1]]
    soft = gate_of(p, [None, None], names, "soft")
    torch.testing.assert_close(soft, torch.tensor([[0.625, 0.375, 0.0], [0.0, 2 / 9, 7 / 9]]))
    assert gate_of(p, ["b", "?"], names, "oracle").tolist() == [[0, 1, 0], [0, 0, 1]]
    assert gate_of(None, ["?"], ["only"], "router").tolist() == [[1]]
    with pytest.raises(UserError, match="got category 'z' and routing: oracle"):
        gate_of(None, ["a", "z"], names, "oracle")


def test_the_logit_of_a_gate_is_that_of_its_mean_probability():
    # sigmoid(log 3) = 3/4 and sigmoid(-log 4) = 1/5: 0.6 x 0.75 + 0.4 x 0.2 = 0.53
    margins = torch.tensor([[3.0, 0.25], [3.0, 0.25], [3.0, 0.25]]).log()
    gate = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.0, 1.0]])
    found = gated_logit(margins, gate)
    torch.testing.assert_close(found.sigmoid(), torch.tensor([0.53, 0.75, 0.2]))
    assert gated_logit(torch.tensor([[1e4, 0.0]]), torch.tensor([[1.0, 0.0]])).item() == 1e4


def test_a_folder_without_a_router_routes_nobody(written):
    _, folder = written
    with pytest.raises(UserError, match="holds no router"):
        MoERewardModel(str(folder))


def test_the_batch_size_changes_no_score(routed):
    _, _, folder = routed
    one = MoERewardModel(str(folder), batch_size=1).score(PROMPTS, ANSWERS)
    all_of_them = MoERewardModel(str(folder)).score(PROMPTS, ANSWERS)
    torch.testing.assert_close(one.total, all_of_them.total, rtol=0, atol=1e-5)


def test_an_explanation_names_each_point_with_both_scores_and_the_totals(routed):
    _, _, folder = routed
    scorer = MoERewardModel(str(folder), routing="oracle")
    found = scorer.details(["tell me"] * 2, ["the cat", "no"], ["tell"] * 2)
    lines = explain(found, scorer.points, 0, 1).splitlines()
    higher = "higher" if found.total[0] > found.total[1] else "lower"
    assert lines[0] == "category tell"
    assert higher in lines[1]
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[3:]}
    assert set(table) == {"art", "calm", "wit", "spread", "total"}
    for name, (first, second, difference) in table.items():
        assert difference == pytest.approx(first - second, abs=0.011), name
    assert table["art"][:2] == pytest.approx(found.points[:, 0].tolist(), abs=0.0051)
    gaps = [abs(table[line.split()[0]][2]) for line in lines[3:6]]
    assert gaps == sorted(gaps, reverse=True)


@pytest.fixture
def command(routed, tmp_path, monkeypatch):
    """A function that runs `python -m lit_rlhf.explain` on three pairs of one prompt."""
    _, _, folder = routed
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "tell me", "chosen": "the cat", "rejected": "no", "category": "tell"}
    pairs.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["explain", str(folder), str(pairs), *arguments])
        monkeypatch.delitem(sys.modules, "lit_rlhf.explain", raising=False)
        runpy.run_module("lit_rlhf.explain", run_name="__main__")

    return run


def test_the_command_explains_as_many_pairs_as_asked_for(command, capsys):
    command("--n", "2", "--routing", "oracle")
    shown = capsys.readouterr().out
    assert shown.count("pairs.jsonl:") == 2
    assert shown.count("first, chosen: the cat\nsecond, rejected: no\ncategory tell\n") == 2
    assert shown.count("prompt: tell me") == 2


def test_the_commands_routing_words_choose_the_weights(command, routed, capsys):
    gate = MoERewardModel(str(routed[2]), routing="soft").details(["tell me"], ["no"]).gate[0]
    best = "ask" if gate[0] > gate[1] else "tell"
    for routing, expected in (("router", f"category {best}\n"), ("soft", f"category {best} (weight {gate.max():.2f})")):
        command("--n=1", f"--routing={routing}")
        assert expected in capsys.readouterr().out


def test_the_commands_mistakes_end_with_status_2(command, capsys):
    for arguments in (["--routing", "best"], ["--n", "1", "--model", "nowhere"]):
        with pytest.raises(SystemExit) as caught:
            command(*arguments)
        assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "error: routing must be router, soft or oracle, got 'best'" in shown


# -- the router -------------------------------------------------------------------------------------------------------


def test_a_router_folder_is_plain_transformers(tiny_llama_path, tiny_gpt2_path, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for path in (tiny_llama_path, tiny_gpt2_path):
        for lora in (None, LoRA(r=2)):
            torch.manual_seed(0)
            model = RouterModel(path, ["ask", "tell", "sing"], ModelOptions(lora=lora))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            encoder = Encoder.from_pretrained(path, max_length=32)
            rows = encoder.collate(encoder.questions(PROMPTS))
            expected = model.eval()(rows)
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            model.export(folder, AutoTokenizer.from_pretrained(path))
            plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            assert plain.config.id2label == {0: "ask", 1: "tell", 2: "sing"}
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ids = rows.ids.where(rows.attention_mask, torch.tensor(tokenizer.pad_token_id))
            logits = plain(input_ids=ids, attention_mask=rows.attention_mask.long()).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            router = Router(str(folder), batch_size=2)
            assert router.categories == ("ask", "tell", "sing")
            torch.testing.assert_close(router.probabilities(PROMPTS), expected.softmax(-1), rtol=0, atol=1e-5)


def test_a_router_starts_from_the_pretrained_weights(tiny_llama_path, tiny_gpt2_path):
    """The released code builds its bodies from a config, so they start random."""
    for path in (tiny_llama_path, tiny_gpt2_path):
        expected = Backbone(path).causal_lm.base_model.state_dict()
        found = RouterModel(path, ["ask", "tell"]).classifier.base_model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_causal_model_is_no_router(tiny_llama_path):
    with pytest.raises(UserError, match="this is no router"):
        Router(tiny_llama_path).probabilities(["who"])


def test_some_rows_of_a_batch(tiny_llama_path):
    batch = padded(ROWS)
    chosen = select(batch, torch.tensor([2, 2, 0]))
    assert torch.equal(chosen.ids, batch.ids[[2, 2, 0]])
    assert torch.equal(chosen.attention_mask, batch.attention_mask[[2, 2, 0]])


def test_two_gates_of_one_row_add_up(tiny_llama_path):
    moe = moved(tiny_llama_path).eval()
    encoder = Encoder.from_pretrained(tiny_llama_path, max_length=32)
    rows = encoder.encode_many(PROMPTS, ANSWERS)
    gate = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0], [0.5, 0.5]])
    found = score_rows(moe, encoder, rows, gate, "mean", batch_size=3).total
    pure = [score_rows(moe, encoder, rows, one.expand(4, 2), "mean").total for one in torch.eye(2)]
    torch.testing.assert_close(found, gate[:, 0] * pure[0] + gate[:, 1] * pure[1], rtol=0, atol=1e-5)
