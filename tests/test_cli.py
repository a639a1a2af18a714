"""The command line as a user meets it: every config runs, and every mistake ends in one message and status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_rlhf.front import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "bon")  # that one is for `bon`
QUICK = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]


def run(*argv):
    """Return exit status, whether main returned it or the parser raised it."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def fit(name, tmp_path, *more):
    return run(
        "fit", "--config", ROOT / "configs" / f"{name}.yaml", "--trainer.logger.init_args.save_dir", tmp_path,
        "--data.init_args.limit=64", "--data.init_args.batch_size=32", *QUICK, *more,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def pairs(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row + "\n" for row in rows))
    return path


def length(prompts, responses, categories=None):
    return [float(len(response)) for response in responses]


def probed(config):
    return "callbacks.GoldProbe" in config.read_text()


LENGTH = f"{__name__}:length"
POLICIES = {"sft", "dpo", "ipo", "slic", "rdpo", "rpo", "dpo_stop_at_peak"}  # configs that train one, with a gold probe
GOOD = [
    {
        "prompt": f"prompt {i} is", "chosen": f"good {i}", "rejected": f"bad {i}",
        "category": ("long", "short")[i % 2], "aspects": {"tone": 1, "facts": -1},
    }
    for i in range(40)
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_and_leaves_a_run_folder(config, tmp_path):
    assert fit(config.stem, tmp_path) == 0
    folder = tmp_path / config.stem / "version_0"
    assert (folder / "config.yaml").exists()
    assert any((folder / "hf" / name).exists() for name in ("config.json", "reward.json"))
    assert list(folder.glob("events.out.tfevents.*"))
    if config.stem in POLICIES:
        assert (folder / "checkpoints" / "last.ckpt").exists()
        steps = [json.loads(line)["step"] for line in (folder / "probe.jsonl").read_text().splitlines()]
        assert steps == [0, 2]
    if config.stem.startswith("ppo"):  # 8 optimizer steps an update
        found = [json.loads(line) for line in (folder / "probe.jsonl").read_text().splitlines()]
        assert [record["step"] for record in found] == [0, 8]
        assert [record["update"] for record in found] == [0, 1]
        assert all(record["method"] == config.stem.replace("_ensemble", "") for record in found)
        assert (folder / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_on_own_data_and_model(config, tmp_path, tiny_gpt2_path):
    data = pairs(tmp_path / "own.jsonl", GOOD)
    arguments = ["--model.init_args.model_name_or_path", tiny_gpt2_path, "--data.init_args.train", data]
    if config.stem.startswith("reward_moe"):  # the world's are Llama's
        arguments += ["--model.init_args.lora.target_modules", "all-linear"]
    if config.stem.startswith("ppo"):  # the tiny model's window is 64 tokens
        arguments += ["--data.init_args.max_new_tokens=8", "--model.init_args.sampling.max_new_tokens=8"]
    if config.stem == "ppo_nelder_mead":  # it needs a gold scorer, and there are four validation prompts
        scorer = ["lit_rlhf.models.scorers.FunctionScorer", "--data.init_args.gold.init_args.function", LENGTH]
        arguments += ["--model.init_args.search.prompts=2", "--data.init_args.gold", *scorer]
    assert fit(config.stem, tmp_path, *arguments) == 0
    if config.stem in POLICIES:
        record = json.loads((tmp_path / config.stem / "version_0" / "probe.jsonl").read_text().splitlines()[0])
        assert record["gold"] is None
        assert record["proxy"] is None


MISTAKES = {
    "missing file": (["--data.init_args.train", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "broken json": (["--data.init_args.train", "{tmp}/broken.jsonl"], ["broken.jsonl", "7"]),
    "no rejected": (["--data.init_args.train", "{tmp}/half.jsonl"], ["half.jsonl:3", "rejected"]),
    "empty response": (["--data.init_args.train", "{tmp}/empty.jsonl"], ["empty.jsonl:2", "chosen"]),
    "long prompts": (["--data.init_args.train", "{tmp}/long.jsonl"], ["long.jsonl:1", "prompt", "128"]),
    "unknown key": (["--model.init_args.betta", "1"], ["betta"]),
    "wrong type": (["--data.init_args.batch_size", "many"], ["batch_size", "many"]),
    "bad beta": (["--model.loss.beta", "-1"], ["beta", "-1"]),
    "no model": (["--model.init_args.model_name_or_path", "{tmp}"], ["{tmp}"]),
    "hub id offline": (["--model.init_args.model_name_or_path", "nobody/nothing"], ["nobody/nothing"]),
    "hub data offline": (["--data.init_args.train", "nobody/nothing"], ["nobody/nothing"]),
    "missing checkpoint": (["--ckpt_path", "{tmp}/no.ckpt"], ["no.ckpt"]),
    "not a checkpoint": (["--ckpt_path", "{tmp}/half.jsonl"], ["half.jsonl"]),
    "nothing to resume": (["--ckpt_path", "last"], ["last"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_message_and_status_2(name, tmp_path, capfd):
    pairs(tmp_path / "broken.jsonl", [*GOOD[:6], '{"prompt": "a", "chosen": '])
    pairs(tmp_path / "half.jsonl", [*GOOD[:2], {"prompt": "a", "chosen": "b"}, *GOOD[2:]])
    pairs(tmp_path / "empty.jsonl", [GOOD[0], {"prompt": "a", "chosen": "", "rejected": "b"}, *GOOD[2:]])
    pairs(tmp_path / "long.jsonl", [{"prompt": f"{i} " * 400, "chosen": "a", "rejected": "b"} for i in range(3)])
    arguments, expected = MISTAKES[name]
    assert fit("dpo", tmp_path, *(a.format(tmp=tmp_path) for a in arguments)) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    for word in expected:
        assert word.format(tmp=tmp_path) in message, message


def test_a_checkpoint_of_another_module_is_refused(tmp_path, capfd):
    assert fit("reward", tmp_path) == 0
    checkpoint = tmp_path / "reward" / "version_0" / "checkpoints" / "last.ckpt"
    capfd.readouterr()
    assert fit("dpo", tmp_path, "--ckpt_path", checkpoint) == 2
    assert "RewardModule" in capfd.readouterr().err


def test_a_process_of_its_own_ends_without_a_traceback(tmp_path):
    command = [sys.executable, "train.py", "fit", "--config", "configs/dpo.yaml", "--data.init_args.train", "no.jsonl"]
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "no.jsonl" in done.stderr


def test_label_flips_exactly_the_stated_share(tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert run("label", out, "--n", "200", "--noise", "0.25", "--seed", "3") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(row["flipped"] for row in rows) == round(0.25 * len(rows))
    for row in rows:
        assert (row["gold"]["chosen"] < row["gold"]["rejected"]) == row["flipped"]
    assert "labels wrong" in capsys.readouterr().out


def test_an_ensemble_predicts_alike_from_its_run_its_folder_and_its_export(tmp_path):
    assert fit("reward_ensemble", tmp_path) == 0
    folder, data, exported = tmp_path / "reward_ensemble" / "version_0", tmp_path / "data.jsonl", tmp_path / "exported"
    assert run("label", data, "--n", "8") == 0
    assert run("export", folder, exported) == 0
    found = []
    for model in (folder, folder / "hf", exported):
        assert run("predict", model, data, tmp_path / "out.jsonl") == 0
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        found.append(torch.tensor([row["scores"][side]["members"] for row in rows for side in ("chosen", "rejected")]))
    assert found[0].shape == (16, 5)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)
    assert run("predict", folder / "hf" / "member-3", data, tmp_path / "out.jsonl") == 0


def test_sample_predict_and_export(tmp_path, capsys):
    assert fit("reward", tmp_path) == 0
    assert fit("dpo", tmp_path) == 0
    data = tmp_path / "data.jsonl"
    assert run("label", data, "--n", "12") == 0
    capsys.readouterr()
    assert run("sample", tmp_path / "dpo" / "version_0", "tell me a story", "--n", "2", "--seed", "1") == 0
    assert capsys.readouterr().out.count("> tell me a story") == 2
    for name in ("reward", "dpo"):
        assert run("predict", tmp_path / name / "version_0", data, tmp_path / f"{name}.jsonl") == 0
    scored = [json.loads(line) for line in (tmp_path / "reward.jsonl").read_text().splitlines()]
    assert len(scored) == 12
    assert {"total", "members", "parts"} == set(scored[0]["scores"]["chosen"])
    answered = [json.loads(line) for line in (tmp_path / "dpo.jsonl").read_text().splitlines()]
    assert len(answered) == 12
    assert set(answered[0]) == {"prompt", "response"}
    assert run("export", tmp_path / "dpo" / "version_0", tmp_path / "exported") == 0
    same = {p: (tmp_path / p / "model.safetensors").read_bytes() for p in ("exported", "dpo/version_0/hf")}
    assert len(set(same.values())) == 1


def test_resuming_continues_the_folder(tmp_path):
    # extended by epochs: when max_steps ends a run inside its plan, Lightning 2.6 saves a position that it cannot read
    assert fit("dpo", tmp_path, "--trainer.max_steps=-1", "--trainer.max_epochs=1") == 0
    assert fit("dpo", tmp_path, "--trainer.max_steps=-1", "--trainer.max_epochs=2", "--ckpt_path", "last") == 0
    assert [p.name for p in (tmp_path / "dpo").iterdir()] == ["version_0"]
    lines = (tmp_path / "dpo" / "version_0" / "probe.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [0, 2, 4]


def test_last_is_the_last_step_and_resuming_twice_goes_on(tmp_path, tiny_gpt2_path):
    data = pairs(tmp_path / "own.jsonl", GOOD)
    arguments = ["--model.init_args.model_name_or_path", tiny_gpt2_path, "--data.init_args.train", data]
    arguments += ["--data.init_args.batch_size=4", "--trainer.max_steps=-1"]
    for epochs in (1, 2, 3):
        more = ["--ckpt_path", "last"] if epochs > 1 else []
        assert fit("dpo", tmp_path, *arguments, f"--trainer.max_epochs={epochs}", *more) == 0
        folder = tmp_path / "dpo" / "version_0"
        checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert checkpoints.count("last.ckpt") == 1
        assert "last-v1.ckpt" not in checkpoints
        last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        steps = [json.loads(line)["step"] for line in (folder / "probe.jsonl").read_text().splitlines()]
        assert last["global_step"] == steps[-1] == epochs * steps[1]


def test_validating_leaves_the_run_folder_as_it_was(tmp_path):
    assert fit("reward", tmp_path) == 0
    config = tmp_path / "reward" / "version_0" / "config.yaml"
    before = config.read_text()
    assert run(
        "validate", "--config", ROOT / "configs/reward.yaml", "--ckpt_path", config.parent / "checkpoints/last.ckpt",
        "--trainer.logger.init_args.save_dir", tmp_path, "--data.init_args.limit=64", "--trainer.limit_val_batches=1",
    ) == 0  # fmt: skip
    assert config.read_text() == before


def test_a_strangers_checkpoint_runs_no_code(tmp_path):
    assert fit("dpo", tmp_path) == 0
    path = tmp_path / "dpo" / "version_0" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    scorer = {"class_path": "lit_rlhf.models.scorers.FunctionScorer", "init_args": {"function": "evil:run"}}
    content["hyper_parameters"] |= {"trust_remote_code": True, "proxy": scorer}
    torch.save(content, path)
    sys.path.insert(0, str(tmp_path))
    try:
        assert run("sample", tmp_path / "dpo" / "version_0", "tell me a story") == 0
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_an_exported_adapter_is_read_back(tmp_path, capsys):
    assert fit("dpo", tmp_path, "--model.init_args.lora.r=4") == 0
    capsys.readouterr()
    for place in ("", "hf"):
        assert run("sample", tmp_path / "dpo" / "version_0" / place, "tell me a story", "--seed", "5") == 0
    shown = capsys.readouterr().out.split("> tell me a story")
    assert shown[1] == shown[2]


def test_the_shipped_proxies_differ():
    files = [ROOT / "lit_rlhf" / "assets" / f"proxy-{i}" / "model.safetensors" for i in range(5)]
    assert len({path.read_bytes() for path in files}) == 5


def test_an_unknown_command_names_those_there_are(capsys):
    assert run("frobnicate") == 2
    assert "unknown command 'frobnicate'; expected one of fit" in capsys.readouterr().err
