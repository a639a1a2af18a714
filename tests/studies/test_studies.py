"""The studies' plans hold together, and the world's trained parts can be made again from seeds alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_rlhf.assets import resolve
from lit_rlhf.data import PreferenceData, SFTData
from lit_rlhf.models.backbone import Backbone
from lit_rlhf.models.reward import RewardModel
from lit_rlhf.types import Scorer, Scores
from studies import dmoerm, ppo

ROOT = Path(__file__).parent.parent.parent


def snakemake(*arguments):
    command = [sys.executable, "-m", "snakemake", "--nolock", "--cores", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.parametrize(
    ("study", "jobs"), [("quickstart", 13), ("world", 13), ("best_of_n", 4), ("dmoerm", 11), ("ppo", 10)]
)
def test_a_study_plans_its_stages(study, jobs, tmp_path):
    done = snakemake("--snakefile", f"studies/{study}.smk", "-n", "--config", f"out={tmp_path}", f"assets={tmp_path}/a")
    assert done.returncode == 0, done.stderr
    assert f"total {jobs}".replace(" ", "") in done.stdout.replace(" ", "")


def test_labels_as_pairs_point_where_the_aspects_point(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "category": "c", "aspects": {"x": 1, "y": -1, "z": 0}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    dmoerm.labels(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    rows = dmoerm.read(str(tmp_path / "out.jsonl"))
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("a", "b"), ("a", "b"), ("b", "a")]  # pair, x, y


def test_the_share_of_right_pairs_counts_ties_half():
    class Length(Scorer):
        def score(self, prompts, responses, categories=None):
            return Scores(torch.tensor([float(len(r)) for r in responses]))

    rows = [
        {"prompt": "p", "category": None, "chosen": c, "rejected": r} for c, r in [("aa", "a"), ("a", "b"), ("", "a")]
    ]
    assert dmoerm.right_share(Length(), rows) == pytest.approx(1.5 / 3)


def test_a_table_takes_each_model_over_the_seeds_that_have_it(tmp_path, capsys):
    for seed, found in enumerate(({"dmoerm": 0.8, "one": 0.7}, {"dmoerm": 0.6, "one": 0.7, "late": 0.9})):
        (tmp_path / f"{seed}.json").write_text(json.dumps(found))
    dmoerm.table(*map(str, sorted(tmp_path.iterdir())))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| late ")
    assert len(lines) == 5
    assert "| late | 1 | 0.900 | +0.300 |" in lines
    assert any(line.startswith("| one | 2 | 0.700 ± 0.000 | ") for line in lines)


def test_what_a_ppo_run_did_by_hand():
    """Gold rises to 0.4 and falls to 0.1 while KL goes 0, 2, 6: at 4 nats it is halfway."""
    run = [{"kl_k1": kl, "gold_z": g, "gold": g, "proxy_z": p} for kl, g, p in ((0, 0, 0), (2, 0.4, 1), (6, 0.1, 3))]
    assert ppo.gold_at(run, 4) == pytest.approx(0.25)
    assert ppo.gold_at(run, 7) is None
    assert ppo.fallen({0: run}) == 1
    assert ppo.fallen({0: run[:2]}) == 0
    assert ppo.peak_to_end({0: run}, "proxy_z") == [2]


def test_thirds_and_falls_of_ppo_runs_by_hand():
    def golds(*values):
        return [{"gold_z": value, "kl_k1": 2.0 * step} for step, value in enumerate(values)]

    assert ppo.thirds(golds(9, 1, 3, 5, 5, 0, 2)) == [2, 5, 1]  # step 0 is left out
    assert ppo.fall(golds(0, 3, 1)) == 2
    single, ensemble = {1: golds(0, 3, 1), 2: golds(0, 4, 0)}, {1: golds(0, 1, 1), 2: golds(0, 5, 0)}
    expected = "fall +3.000 ± 12.706 on one member, +2.500 ± 31.765 on the ensemble: less by +0.500 ± 19.059, in 1 of 2"
    found = ppo.falls_compared(single, ensemble)
    assert found == f"{expected}; at 2 nats gold is higher by -0.500 ± 19.059, in 1 of 2"
    assert ppo.falls_compared(single | {3: golds(0, 9)}, ensemble) == found


@torch.no_grad()
def nll(path):
    """Nats a response token on 200 held-out rows of the world."""
    data = SFTData(tokenizer="builtin:policy", batch_size=200)
    data.setup("validate")
    batch = next(iter(data.val_dataloader())).sequences
    return (-Backbone(path)(batch).sum() / batch.response_mask.sum()).item()


@torch.no_grad()
def accuracy(path):
    """Share of the 1,000 clean validation pairs in which the better response scores higher."""
    data = PreferenceData(tokenizer="builtin:policy", batch_size=1000)
    data.setup("validate")
    chosen, rejected = RewardModel(path)(next(iter(data.val_dataloader())).sequences).chunk(2)
    return (chosen > rejected).float().mean().item()


def test_the_shipped_parts_are_good_enough_to_learn_from():
    assert nll(resolve("builtin:policy")) < 1.75
    for i in range(5):
        assert accuracy(resolve(f"builtin:proxy-{i}")) > 0.6  # 0.5 is chance; standard error 0.015


def test_the_shipped_parts_fit_the_package():
    sizes = [path.stat().st_size for path in (ROOT / "lit_rlhf" / "assets").rglob("*") if path.is_file()]
    assert sum(sizes) < 3e6
    for path in (ROOT / "lit_rlhf" / "assets").rglob("config.json"):
        assert json.loads(path.read_text())["model_type"] == "llama"


@pytest.mark.slow
def test_the_world_can_be_made_again(tmp_path):
    arguments = ["--config", f"out={tmp_path}/runs", f"assets={tmp_path}/assets", "proxies=1"]
    done = snakemake("--snakefile", "studies/world.smk", "--quiet", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    remade = nll(str(tmp_path / "assets" / "policy"))
    assert remade == pytest.approx(nll(resolve("builtin:policy")), rel=0.02)
    gap = accuracy(str(tmp_path / "assets" / "proxy-0")) - accuracy(resolve("builtin:proxy-0"))
    assert abs(gap) < 0.04
