"""The report's section on reward models, and the summary that `predict` makes of pairs, from the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_rlhf import evaluation, records, report, report_reward
from lit_rlhf.errors import UserError
from lit_rlhf.front import main
from lit_rlhf.functional.pair_stats import Pairs, shift, summarise
from lit_rlhf.functional.probe_stats import finite

ROOT = Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>"


def make_run(folder, label="rm", seed=0, *, split="validation", step=100, policy=True, gates=False, quality=0.8):
    """A run folder with one record of sixty random pairs."""
    rng = np.random.default_rng(seed)
    n = 60
    chosen = rng.normal(size=n) + quality
    pairs = Pairs(
        chosen, rng.normal(size=n), np.ones(n), rng.integers(3, 30, size=n).astype(float),
        rng.integers(3, 30, size=n).astype(float), rng.integers(0, 25, size=n),
        list(np.array(["poems", EVIL])[rng.integers(0, 2, size=n)]),
        {"expert a": np.ones(n), EVIL: np.zeros(n)} if gates else {},
    )  # fmt: skip
    found = summarise(pairs)
    found["policy"] = {"source": "p", **shift(pairs.scores, range(2 * n), rng.normal(size=20), range(20))}
    if not policy:
        found["policy"] = None
    about = {"method": "reward", "label": label, "seed": seed, "config_hash": "a", "split": split, "step": step}
    records.append(folder / records.REWARD, [finite(about | {"length_unit": "tokens"} | found)])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    for seed in range(3):
        make_run(root / f"seed-{seed}", "three seeds", seed)
    one = make_run(root / "one", f"one {EVIL}", 7, gates=True, policy=False)
    make_run(one, f"one {EVIL}", 7, gates=True, policy=False, split="test", step=0)
    make_run(one, f"one {EVIL}", 7, gates=True, policy=False, step=50, quality=-3)
    return root


def test_seeds_group_and_the_last_of_a_split_counts(runs):
    found = {(m.label, m.split): m for m in report_reward.load([runs])}
    assert {key: len(m.records) for key, m in found.items()} == {
        ("three seeds", "validation"): 3, (f"one {EVIL}", "validation"): 1, (f"one {EVIL}", "test"): 1,
    }  # fmt: skip
    (last,) = found[f"one {EVIL}", "validation"].records
    assert last["step"] == 100
    right = last["accuracy"]
    shown = f"{right['value']:.3f} [{right['low']:.3f}, {right['high']:.3f}]"
    assert found[f"one {EVIL}", "validation"].share("accuracy") == shown
    values = [r["accuracy"]["value"] for r in found["three seeds", "validation"].records]
    half = 4.3027 * np.std(values, ddof=1) / np.sqrt(3)
    assert found["three seeds", "validation"].share("accuracy") == f"{np.mean(values):.3f} ± {half:.3f}"


def test_the_section_is_rendered_and_escaped(runs, tmp_path, capsys):
    page = tmp_path / "r.html"
    report.main([str(runs), "-o", str(page)])
    text = page.read_text()
    printed = capsys.readouterr().out
    assert "three seeds" in printed
    assert "longer is better" in printed
    assert "<h2>Reward models</h2>" in text
    assert "What 0 methods" not in text
    assert text.count("<svg") == 9
    assert "#0072b2" not in text[text.index("<h2>Reward") :]
    assert "<script" not in text
    assert "poems" in text
    assert "Use of experts" in text
    assert "Policy samples" in text
    for name in ("three seeds, validation, seed 0", "validation, seed 7", "test, seed 7"):  # whose figures follow
        assert re.search(rf"<h3>[^<]*{name}</h3>\s*<div class=\"grid\">\s*<figure>", text)
    assert "seed 1" not in text
    assert text.count("<h3>Use of experts: ") == text.count(', seed 7</h3>\n<div class="box"') == 2
    for model in report_reward.load([runs]):
        assert model.share("accuracy") in text
        assert model.number("ece") in text


def test_figures_are_of_the_seed_that_is_named(tmp_path):
    from lit_rlhf import plots, plots_reward

    for seed in (4, 3):
        make_run(tmp_path / f"version_{4 - seed}", seed=seed, policy=False)
    (model,) = report_reward.load([tmp_path])
    assert model.seed == ", seed 4"
    page, svgs = report_reward.section([model]), []
    for record in model.records:
        svg = plots.svg(plots_reward.reliability_figure(record), "Reliability of reward model 0")
        svgs.append(svg in page)
    assert svgs == [True, False]


def test_policies_and_reward_models_share_a_report(runs, tmp_path):
    probe = [{"method": "dpo", "step": s, "kl_k1": float(s), "gold": s, "gold_z": float(s)} for s in range(4)]
    records.append(tmp_path / "dpo" / records.PROBE, probe)
    text = report.html(report.load([tmp_path / "dpo", runs]), "t", report_reward.load([tmp_path / "dpo", runs]))
    assert "What 1 method gained" in text
    assert text.index("Answers before and after") < text.index("<h2>Reward models</h2>") < text.index("Configurations")
    assert "Reward models" not in report.html(report.load([tmp_path / "dpo"]), "t")


def test_neither_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"probe\.jsonl.*reward\.jsonl"):
        report.main([str(tmp_path)])


def test_the_section_needs_no_torch(runs, tmp_path):
    arguments = json.dumps([str(runs), "-o", str(tmp_path / "r.html")])
    code = (
        f"import sys; from lit_rlhf import report; report.main({arguments});"
        "heavy = {'torch', 'lightning', 'transformers', 'matplotlib.pyplot'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def scored(prompt, chosen, rejected, *totals, category=None):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    scores = {key: {"total": value} for key, value in zip(("chosen", "rejected"), totals, strict=True)}
    return row | ({} if category is None else {"category": category}) | {"scores": scores}


def test_an_evaluation_by_hand():
    """Chat: right and tied, 3/4; math: wrong and right, 1/2; longer is better: right, right, tied, wrong."""
    found = evaluation.evaluate(
        [
            scored("a", "long", "s", 2.0, 1.0, category="chat"), scored("A ", "long", "s", 1.0, 1.0, category="chat"),
            scored("b", "one", "two", 0.0, 3.0, category="math"), scored("c", "1", "two", 4.0, 3.0, category="math"),
        ]
    )  # fmt: skip
    assert found["accuracy"]["value"] == found["length_accuracy"]["value"] == found["macro"]["value"] == 0.625
    assert {name: entry["accuracy"]["value"] for name, entry in found["categories"].items()} == {
        "chat": 0.75, "math": 0.5,
    }  # fmt: skip
    assert (found["accuracy"]["n"], found["accuracy"]["clusters"]) == (4, 3)  # "a" and "A " are one prompt
    assert found["ties"] == 1
    lines = evaluation.table(found).splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == ["chat", "math", "mean over categories", "all pairs"]
    assert "0.750" in lines[2]


def test_a_score_that_is_no_number_is_told():
    with pytest.raises(UserError, match="pair 2: the score of `rejected` is nan"):
        evaluation.evaluate([scored("a", "b", "c", 1.0, 2.0), scored("a", "b", "c", 1.0, float("nan"))])


def run(*argv):
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def test_predict_sums_up_pairs(tmp_path, capsys, monkeypatch):
    """A file with RewardBench's `subset` and a ranked row, scored by a shipped reward model."""
    monkeypatch.chdir(ROOT)
    rows = [
        {"prompt": f"tell me a story {i % 4}", "chosen": "this is a good one", "rejected": "no", "subset": "ab"[i % 2]}
        for i in range(8)
    ]
    rows.append({"prompt": "and now?", "responses": ["x y", "y", "z"], "rank": [1, 2, 3], "category": "ranked"})
    data, out = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("predict", "builtin:proxy-0", data, out, "--batch_size", "3") == 0
    printed = capsys.readouterr().out
    assert "11 rows written" in printed
    assert "mean over categories" in printed
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["category"] for row in found] == [*"abababab", *["ranked"] * 3]
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert summary["model"] == "builtin:proxy-0"
    assert {name: entry["accuracy"]["n"] for name, entry in summary["categories"].items()} == {
        "a": 4, "b": 4, "ranked": 3,
    }  # fmt: skip
    margins = [row["scores"]["chosen"]["total"] - row["scores"]["rejected"]["total"] for row in found]
    right = np.mean([1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins])
    assert summary["accuracy"]["value"] == pytest.approx(right, abs=1e-12)
    assert summary["accuracy"]["clusters"] == 5


def test_single_responses_have_no_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": "tell me", "response": "a story"}) + "\n")
    assert run("predict", "builtin:proxy-0", data, tmp_path / "out.jsonl") == 0
    assert [path.name for path in tmp_path.iterdir() if "summary" in path.name] == []


def test_fit_and_validate_by_the_command_line_show_the_tags(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shared = [
        "--config", "configs/reward.yaml", "--trainer.logger.init_args.save_dir", tmp_path, "--data.init_args.limit=64",
        "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    assert run("fit", *shared, "--trainer.max_steps=2") == 0
    folder = tmp_path / "reward" / "version_0"
    assert run("validate", *shared, "--ckpt_path", folder / "checkpoints" / "last.ckpt") == 0
    printed = capsys.readouterr().out
    assert "val/reward/ece" in printed
    assert "validation at step" in printed
    a, b = (records.read(tmp_path / "reward" / f"version_{i}" / records.REWARD)[-1] for i in (0, 1))
    assert a["accuracy"]["n"] == b["accuracy"]["n"] == 32
    assert a["categories"].keys() == b["categories"].keys()
    tags = report._scalars(folder)
    for name in ("ece", "brier", "length_accuracy", "length_spearman", "accuracy_low"):
        assert f"val/reward/{name}" in tags
    page = tmp_path / "r.html"
    assert run("report", folder, "-o", page) == 0
    assert "<h2>Reward models</h2>" in page.read_text()


def test_predict_sums_up_an_ensemble_folder(tmp_path, monkeypatch, tiny_llama_path):
    from lit_rlhf.modules import RewardEnsembleModule

    monkeypatch.chdir(ROOT)
    module = RewardEnsembleModule(model_name_or_path=tiny_llama_path, members=2, mode="heads", seed=0)
    module.configure_model()
    module.reward_model.set_scale(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0]))
    module.export(str(tmp_path / "ensemble"))
    rows = [{"prompt": "tell me", "chosen": f"the {word}", "rejected": "no", "subset": "x"} for word in ("cat", "dog")]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("predict", tmp_path / "ensemble", data, tmp_path / "out.jsonl") == 0
    found = [json.loads(line)["scores"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(scores["chosen"]["members"]) for scores in found] == [2, 2]
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    right = np.mean([scores["chosen"]["total"] > scores["rejected"]["total"] for scores in found])
    assert summary["accuracy"]["value"] == summary["categories"]["x"]["accuracy"]["value"] == right
