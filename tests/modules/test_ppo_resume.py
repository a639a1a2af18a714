"""A PPO run that was killed and went on is, bit for bit, the run that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
KILLS = {"plain": 1, "xi": 2, "xi-lora": 3, "minibatch": 2, "cost": 1, "tuned": 2}  # update 2 ends an epoch


@pytest.fixture(scope="module")
def out(tmp_path_factory, tiny_llama_path):
    folder = tmp_path_factory.mktemp("resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    cases = ",".join(f"{case}:{kill}" for case, kill in KILLS.items())
    command = [sys.executable, "-m", "tests.modules.ppo_worker", str(folder), "resume", tiny_llama_path, cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(out, case):
    kill, (whole, parts) = KILLS[case], (out / case / part for part in ("whole", "parts"))
    straight, resumed = (json.loads((folder / "auto-0.json").read_text())[case] for folder in (whole, parts))
    updates = 4 if case != "tuned" else straight["updates"]  # which stops early, and so goes on longer
    assert resumed["updates"] == straight["updates"] == updates >= 4
    assert resumed["examples"] == straight["examples"]
    begun = updates - len(resumed["logged"])  # checkpoints lie 4 steps apart: with the updates, unless they stop early
    assert begun == kill or (case == "tuned" and 0 < begun < kill)
    probed = [
        [json.loads(line) for line in (f / case / "auto/probe.jsonl").read_text().splitlines()] for f in (whole, parts)
    ]
    for a, b in zip(*probed, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for a, b in zip(straight["logged"][begun:], resumed["logged"], strict=True):
        assert {k: v for k, v in a.items() if k in b} == b
    for key in ("multipliers", "coefficient", "scale"):
        assert resumed[key] == straight[key], key
    one, two = (torch.load(f / f"{case}-auto" / "last.ckpt", weights_only=True) for f in (whole, parts))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    same(one["optimizer_states"], two["optimizer_states"])
    same(one["lr_schedulers"], two["lr_schedulers"])
    assert one["global_step"] == two["global_step"] == 16


def same(one, two):
    """Assert that two nests of containers hold equal values."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, two, strict=True):
            same(a, b)
    else:
        assert one == two
