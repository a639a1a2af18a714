"""Two processes train as one does: losses, validation, probe and exports, under DDP and FSDP2, full and LoRA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.multi, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "worker.py"
CASES = [f"{kind}-{how}" for kind in ("sft", "reward", "reward_ensemble", "preference") for how in ("full", "lora")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29653"]
    for strategy, launch in (("auto", [sys.executable]), ("ddp", two), ("fsdp", two)):
        command = [*launch, str(WORKER), str(out), strategy, "builtin:policy"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return out, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_validation_equal_one_process(results, strategy, case):
    _, found = results
    one, two = found["auto-0"][case], found[f"{strategy}-0"][case]
    assert len(one["losses"]) == 4
    assert len(set(one["losses"])) == 4
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert two["losses"] == found[f"{strategy}-1"][case]["losses"]
    assert two["validation"] == pytest.approx(one["validation"], abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_really_sharded(results, case):
    _, found = results
    sharded = [found[f"fsdp-{rank}"][case] for rank in (0, 1)]
    assert sum(entry["local"] for entry in sharded) == sharded[0]["parameters"]
    assert max(entry["local"] for entry in sharded) < 0.7 * sharded[0]["parameters"]
    assert found["ddp-0"][case]["local"] == found["ddp-0"][case]["parameters"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("reward")])
def test_the_probe_sees_the_same_policy(results, strategy, case):
    _, found = results
    one, two = found["auto-0"][case]["probe"], found[f"{strategy}-0"][case]["probe"]
    assert [record["step"] for record in two] == [0, 2, 4]
    for a, b in zip(one, two, strict=True):
        for key in ("kl_k1", "kl_k3", "gold", "length", "win_rate"):
            assert b[key] == pytest.approx(a[key], abs=1e-4), key
    assert two[0]["kl_k1"] == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("reward")])
def test_reward_diagnostics_are_those_of_one_process(results, strategy, case):
    _, found = results
    one, two = found["auto-0"][case]["diagnostics"], found[f"{strategy}-0"][case]["diagnostics"]
    assert [record["step"] for record in two] == [2, 4]
    for a, b in zip(one, two, strict=True):
        assert a["accuracy"] == b["accuracy"]
        assert a["accuracy"]["n"] == 16
        assert b["categories"].keys() == a["categories"].keys()
        for key in ("brier", "ece", "margin"):
            assert b[key] == pytest.approx(a[key], abs=1e-5), key
        for key in ("shift", "auroc", "samples"):
            assert b["policy"][key] == pytest.approx(a["policy"][key], abs=1e-4), key


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_the_exported_weights_are_the_same(results, strategy, case):
    out, _ = results
    weights = "adapter_model.safetensors" if case.endswith("lora") else "model.safetensors"
    files = sorted((out / case / "auto" / "hf").rglob(weights))
    assert len(files) == (4 if case.startswith("reward_ensemble") else 1)
    for file in files:
        one, two = load_file(file), load_file(out / case / strategy / file.relative_to(out / case / "auto"))
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert (value - two[name]).abs().max() < 1e-4, name
