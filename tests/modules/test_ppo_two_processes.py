"""PPO on two processes is PPO on one: advantages, losses, multipliers, weights; under DDP and FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.multi, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
CASES = ("plain", "xi", "xi-lora", "all-model", "minibatch", "cost", "mu-sat", "worst", "tuned", "long")


TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29671"]


def work(launch, out, *arguments):
    """Run the worker; return how it ended and what it said."""
    command = [sys.executable, *launch, "-m", "tests.modules.ppo_worker", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_llama_path):
    out = tmp_path_factory.mktemp("two")
    for strategy, launch in (("auto", []), ("ddp", TWO), ("fsdp", TWO)):
        code, said = work(launch, out, strategy, tiny_llama_path, ",".join(CASES))
        assert code == 0, said
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_advantages_equal_one_process(results, strategy, case):
    one = results["auto-0"][case]["advantages"]
    shares = [results[f"{strategy}-{rank}"][case]["advantages"] for rank in (0, 1)]
    assert len(one) == 14
    assert not shares[0].keys() & shares[1].keys()
    two = shares[0] | shares[1]
    assert two.keys() == one.keys()
    for index, rows in one.items():
        assert [x for row in two[index] for x in row] == pytest.approx([x for row in rows for x in row], abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_losses_multipliers_and_weights_equal_one_process(results, strategy, case):
    one, two = results["auto-0"][case], results[f"{strategy}-0"][case]
    assert len(one["logged"]) == (4 if case != "tuned" else one["updates"])  # which stops early, and so goes on longer
    for a, b in zip(one["logged"], two["logged"], strict=True):
        for name, value in a.items():
            tolerance = 0.05 if name.endswith("clipfrac") else 2e-4  # a token at the edge is clipped or not
            assert b[name] == pytest.approx(value, abs=tolerance, rel=1e-4), name
    assert two["logged"] == results[f"{strategy}-1"][case]["logged"]
    for key in ("coefficient", "scale", "updates", "examples"):
        assert two[key] == pytest.approx(one[key], abs=1e-5), key
    for name, entry in one["multipliers"].items():
        assert two["multipliers"][name] == pytest.approx(entry, abs=1e-4)
        assert entry["multiplier"] != 0
    for name, value in one["sum"].items():
        assert two["sum"][name] == pytest.approx(value, abs=2e-3), name


def test_ranks_met_rollouts_of_different_lengths(results):
    """The case that hangs where processes do not keep step."""
    first, second = (results[f"fsdp-{rank}"]["long"]["sizes"] for rank in (0, 1))  # rows and longest, by update
    assert len(first) == len(second) == 4
    assert any(a[1] != b[1] for a, b in zip(first, second, strict=True))
    assert any(a[0] != b[0] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_processes_go_on_as_if_nothing_had_happened(results, tiny_llama_path, tmp_path, strategy):
    code, _ = work(TWO, tmp_path, strategy, tiny_llama_path, "xi", "2")
    assert code != 0
    assert not list(tmp_path.glob("*.json"))
    code, said = work(TWO, tmp_path, strategy, tiny_llama_path, "xi")
    assert code == 0, said
    straight, resumed = results[f"{strategy}-0"]["xi"], json.loads((tmp_path / f"{strategy}-0.json").read_text())["xi"]
    assert len(resumed["logged"]) == 2
    for key in ("multipliers", "coefficient", "scale", "updates", "examples", "sum"):
        assert resumed[key] == straight[key], key
    for a, b in zip(straight["logged"][2:], resumed["logged"], strict=True):
        assert {name: value for name, value in a.items() if name in b} == b
