"""Thresholds found in run folders, and a file that training reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lit_rlhf.errors import UserError
from lit_rlhf.front import main as train
from studies.proxy_points import main

ROOT = Path(__file__).parent.parent.parent
SCALE = {"first": {"mean": 2.0, "std": 0.5}, "second": {"mean": -1.0, "std": 4.0}}
TOP = (0.8, 1.2)


def raw(name, z):
    return SCALE[name]["mean"] + SCALE[name]["std"] * z


def write(folder, records, config=None):
    folder.mkdir(parents=True)
    (folder / "probe.jsonl").write_text("".join(json.dumps({"step": 40 * i} | r) + "\n" for i, r in enumerate(records)))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder)


def alone(folder, name, values, golds, path="builtin:proxy-0"):
    """A run on one reward, with values in deviations."""
    rows = [
        {"proxy": raw(name, z), "proxy_by": None, "gold": g, "reward_scale": {name: SCALE[name]}}
        for z, g in zip(values, golds, strict=True)
    ]
    rewards = {name: {"class_path": "x.HFRewardModel", "init_args": {"path": path}}}
    return write(folder, rows, {"model": {"init_args": {"rewards": rewards}}})


def together(folder, seed, count=40):
    """A run on two rewards whose gold is highest at TOP."""
    points = np.random.default_rng(seed).normal([0.6, 0.9], [0.8, 0.9], (count, 2))
    golds = 5 - ((points - TOP) ** 2).sum(1)
    rows = [
        {
            "proxy": float(a + b), "proxy_by": {"first": raw("first", a), "second": raw("second", b)},
            "gold": float(gold), "reward_scale": SCALE,
        }
        for (a, b), gold in zip(points, golds, strict=True)
    ]  # fmt: skip
    return write(folder, rows)


def thresholds(path):
    content = yaml.safe_load(path.read_text())["model"]["init_args"]
    found = {c["init_args"]["name"]: c["init_args"]["threshold"] for c in content["constraints"]}
    return content["units"], {c["class_path"].rpartition(".")[2] for c in content["constraints"]}, found


def test_individual_points_are_the_values_where_mean_gold_is_highest(tmp_path, capsys):
    folders = [
        alone(tmp_path / "a", "first", [0.0, 0.4, 1.0, 1.4], [1.0, 2.0, 2.5, 0.0]),
        alone(tmp_path / "b", "first", [0.0, 0.6, 1.2, 1.6], [1.0, 3.0, 2.0, 0.5]),  # means 1, 2.5, 2.25, 0.25
        alone(tmp_path / "c", "second", [0.0, 0.7, 2.0], [0.0, 1.0, 2.0]),
    ]
    main(["individual", *folders, "-o", str(tmp_path / "t.yaml")])
    units, kinds, found = thresholds(tmp_path / "t.yaml")
    assert (units, kinds) == ("standardised", {"Equal"})
    assert found == pytest.approx({"first": 0.5, "second": 2.0})
    said = capsys.readouterr().out
    assert "first: 0.5000, gold 2.5000 at step 40, 2 runs, their own peaks 0.6000 to 1.0000" in said
    assert "second: 2.0000, gold 2.0000 at step 80 (the last probe: gold may rise further)" in said


def test_raw_units_and_another_kind(tmp_path):
    folder = alone(tmp_path / "a", "first", [0.0, 0.5, 1.0], [0.0, 1.0, 0.5])
    main(["individual", folder, "-o", str(tmp_path / "t.yaml"), "--units", "raw", "--constraint", "AtMost"])
    assert thresholds(tmp_path / "t.yaml") == ("raw", {"AtMost"}, {"first": pytest.approx(2.25)})


def test_a_run_with_several_rewards_says_which_it_was_on(tmp_path):
    folder = together(tmp_path / "a", 0)
    with pytest.raises(UserError, match="the run has the rewards first, second; expected one of them=RUN_FOLDER"):
        main(["individual", folder])
    records = [json.loads(line) for line in (tmp_path / "a" / "probe.jsonl").read_text().splitlines()]
    best = max(records, key=lambda r: r["gold"])["proxy_by"]["second"]
    main(["individual", f"second={folder}", "-o", str(tmp_path / "t.yaml"), "--units", "raw"])
    assert thresholds(tmp_path / "t.yaml")[2] == {"second": pytest.approx(best)}


def test_two_models_under_one_name_are_not_averaged(tmp_path):
    one = alone(tmp_path / "a", "first", [0.0, 1.0], [0.0, 1.0])
    two = alone(tmp_path / "b", "first", [0.0, 2.0], [0.0, 1.0], path="builtin:proxy-1")
    with pytest.raises(UserError, match="b: first is another model than in the folders before; expected NAME="):
        main(["individual", one, two])
    main(["individual", one, f"other={two}", "-o", str(tmp_path / "t.yaml")])
    assert thresholds(tmp_path / "t.yaml")[2] == pytest.approx({"first": 1.0, "other": 2.0})


@pytest.mark.parametrize("surface", [["--surface", "process"], ["--surface", "polynomial", "--degree", "3"]])
@pytest.mark.parametrize("units", ["standardised", "raw"])
def test_joint_points_are_the_top_of_the_surface(tmp_path, capsys, surface, units):
    folders = [together(tmp_path / str(seed), seed) for seed in range(2)]
    main(["joint", *folders, "-o", str(tmp_path / "t.yaml"), "--units", units, *surface])
    wanted = dict(zip(SCALE, TOP, strict=True))
    if units == "raw":
        wanted = {name: raw(name, z) for name, z in wanted.items()}
    _, _, found = thresholds(tmp_path / "t.yaml")
    for name, value in found.items():
        unit = SCALE[name]["std"] if units == "raw" else 1.0
        assert value == pytest.approx(wanted[name], abs=0.08 * unit)
    said = capsys.readouterr().out
    assert "80 probes of 2 runs" in said
    assert ("(sd)" in said) == ("process" in surface)


def test_what_cannot_be_used_is_named(tmp_path):
    lone = alone(tmp_path / "lone", "first", [0.0, 1.0], [0.0, 1.0])
    with pytest.raises(UserError, match="lone: the run has the rewards first; expected several, the same in all runs"):
        main(["joint", together(tmp_path / "a", 0), lone])
    dpo = write(tmp_path / "dpo", [{"proxy": 1.0, "gold": 1.0}])
    with pytest.raises(UserError, match="dpo: the probe at step 0 does not say what the rewards are worth"):
        main(["individual", dpo])
    blind = write(tmp_path / "blind", [{"proxy": 1.0, "gold": None, "reward_scale": {"first": SCALE["first"]}}])
    with pytest.raises(UserError, match="blind: the probe at step 0 has no gold"):
        main(["individual", blind])
    with pytest.raises(UserError, match=r"nowhere/probe.jsonl: no such file"):
        main(["individual", str(tmp_path / "nowhere")])
    done = subprocess.run(
        [sys.executable, "-m", "studies.proxy_points", "joint", lone],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.slow
def test_training_reads_the_file_and_its_probe_feeds_the_next(tmp_path, monkeypatch):
    """Round trip: a run's own probe records give thresholds that a second run holds, in the units that it uses."""
    monkeypatch.chdir(ROOT)
    quick = [
        "--trainer.max_steps=16", "--trainer.enable_progress_bar=false", "--data.init_args.batch_size=16",
        "--data.init_args.limit=64", "--trainer.logger.init_args.save_dir", str(tmp_path),
    ]  # fmt: skip
    configs = ["--config", "configs/ppo_all.yaml"]
    assert train(["fit", *configs, *quick]) == 0
    folder = next(tmp_path.glob("ppo_all/version_0"))
    records = [json.loads(line) for line in (folder / "probe.jsonl").read_text().splitlines()]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for record in records:
        assert record["proxy_by"].keys() == record["reward_scale"].keys()
        for name, entry in record["reward_scale"].items():
            assert entry == {k: float(state[f"scale.{name}/{k}"]) for k in ("mean", "std")}
    names = list(records[0]["reward_scale"])
    main(["individual", f"{names[0]}={folder}", "-o", str(tmp_path / "t.yaml"), "--units", "raw"])
    ((name, threshold),) = thresholds(tmp_path / "t.yaml")[2].items()
    best = max(records, key=lambda record: record["gold"])
    assert threshold == pytest.approx(best["proxy_by"][name], rel=1e-9)
    assert train(["fit", "--config", "configs/ppo_xi.yaml", "--config", str(tmp_path / "t.yaml"), *quick]) == 0
    held = json.loads((tmp_path / "ppo_xi/version_0/probe.jsonl").read_text().splitlines()[-1])["constraints"]
    assert {key: entry["threshold"] for key, entry in held.items()} == {name: pytest.approx(threshold, rel=1e-6)}
    config = yaml.safe_load((tmp_path / "ppo_xi/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["units"] == "raw"
    assert config["model"]["class_path"].endswith("PPOModule")
