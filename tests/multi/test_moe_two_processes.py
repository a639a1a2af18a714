"""A DMoERM trained by two processes is the one that a single process trains, in every phase, under DDP and FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_rlhf.models.moe_folders import read_moe

pytestmark = [pytest.mark.multi, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "moe_worker.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29657"]
    for strategy, launch in (("auto", [sys.executable]), ("ddp", two), ("fsdp", two)):
        command = [*launch, str(WORKER), str(folder), strategy, "builtin:policy"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_losses_validation_and_results_equal_one_process(out, strategy):
    one, two = (json.loads((out / f"{name}.json").read_text()) for name in ("auto", strategy))
    assert len(set(one["losses"])) > 20
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    first, second = (read_moe(out / name / "version_0" / "hf") for name in ("auto", strategy))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3, msg=name)  # rounding, grown by 28 steps
