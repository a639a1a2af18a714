"""The command `bon`: real runs end to end, killed and resumed, and what they leave for people and for the report."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from lit_rlhf import records, report
from lit_rlhf.bon_curves import Columns, Grid, Selector, _about, rankings, standardise
from lit_rlhf.bon_store import Progress, Stream
from lit_rlhf.bon_work import source_of
from lit_rlhf.errors import UserError
from lit_rlhf.front import main
from lit_rlhf.functional.aggregation import Mean, UncertaintyWeighted
from lit_rlhf.functional.best_of_n import best_of_n, kl_bound
from lit_rlhf.models.scorers import Ensemble
from lit_rlhf.models.text_metrics import TextOverlap
from lit_rlhf.types import Scorer

ROOT = Path(__file__).parent.parent
PROXY = {"class_path": "lit_rlhf.models.scorers.HFRewardModel", "init_args": {"path": "builtin:proxy-0"}}
OTHER = {"class_path": "lit_rlhf.models.scorers.HFRewardModel", "init_args": {"path": "builtin:proxy-1"}}
CONFIG = {
    "n_prompts": 5,
    "n_samples": 8,
    "sampling": {"max_new_tokens": 10},
    "rewards": {"two": {"class_path": "lit_rlhf.models.scorers.Ensemble", "init_args": {"scorers": [PROXY, OTHER]}}},
    "selectors": {
        "single": {"reward": "two", "by": "each_member"},
        "mean": {"reward": "two", "by": "lit_rlhf.functional.aggregation.Mean"},
        "uwo": {
            "reward": "two",
            "by": {
                "class_path": "lit_rlhf.functional.aggregation.UncertaintyWeighted",
                "init_args": {"coefficient": 0.5},
            },
        },
        "total": {"reward": "two"},
    },
    "batch_size": 16,
}


def bon(folder, *more, **changes):
    """Run the command in this process, on the tiny configuration with changes; return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "given.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"out": str(folder)} | changes))
    try:
        return main(["bon", "--config", str(config), *map(str, more)])
    except SystemExit as stop:
        return stop.code


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def arrays(run):
    """Members and gold of every sample, read without the package's own reader."""
    responses = rows(run / "responses.jsonl")[1:]
    same = np.array([row["same_as"] for row in responses]).reshape(5, 8)
    members, gold = np.zeros((5, 8, 2)), np.zeros((5, 8))
    for row in rows(run / "scores" / "two.jsonl")[1:]:
        members[row["prompt_index"], row["sample_index"]] = row["members"]
    for row in rows(run / "gold.jsonl")[1:]:
        gold[row["prompt_index"], row["sample_index"]] = row["total"]
    return np.stack([m[s] for m, s in zip(members, same, strict=True)]), np.take_along_axis(gold, same, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bon")
    assert bon(folder) == 0
    return folder / "version_0"


def probes(run, label):
    (found,) = (run / "curves").glob(f"*-{label}")
    return records.read_probe(found)


def test_records_have_the_keys_of_a_probe(run):
    promised = (
        "method label seed config_hash update examples_seen epoch kl_k1 kl_k1_se kl_k2 kl_k2_se kl_k3 kl_k3_se proxy "
        "proxy_se proxy_members proxy_std implicit_reward implicit_margin gold gold_se gold_by proxy_z gold_z "
        "constraints win_rate win_rate_se length eos_rate n_prompts n_samples sampling seconds n kl_bound"
    )
    for label in CONFIG["selectors"]:
        found = probes(run, label)
        assert [record["n"] for record in found] == [1, 2, 4, 8]
        for record in found:
            assert set(promised.split()) <= set(record)
            assert record["kl_bound"] == kl_bound(record["n"])
            assert 0 <= record["kl_empirical"] <= record["kl_bound"] + 1e-12
            assert record["win_rate"] <= record["n"] / (record["n"] + 1) + 1e-12
            low, high = record["gold_interval"]
            assert low <= record["gold"] <= high
            assert len(record["proxy_members"]) == 2
        assert found[0]["gold_z"] == pytest.approx(0, abs=1e-9)
        assert found[0]["proxy_z"] == pytest.approx(0, abs=1e-9)
        assert found[0]["win_rate"] == pytest.approx(0.5, rel=1e-9)
        assert found[0]["label"] == f"best-of-n, {label}"


def test_curves_are_the_estimator_on_what_is_on_disk(run):
    members, gold = arrays(run)
    scaled = (members - members.mean((0, 1))) / members.reshape(-1, 2).std(0, ddof=1)
    single = np.mean([best_of_n(scaled[..., k], gold, [1, 2, 4, 8]).gold.mean(1) for k in range(2)], axis=0)
    assert [r["gold"] for r in probes(run, "single")] == pytest.approx(single.tolist(), rel=1e-9)
    mean = best_of_n(scaled.mean(2), gold, [1, 2, 4, 8])
    assert [r["gold"] for r in probes(run, "mean")] == pytest.approx(mean.gold.mean(1).tolist(), rel=1e-9)
    assert [r["proxy"] for r in probes(run, "mean")] == pytest.approx(mean.proxy.mean(1).tolist(), rel=1e-9, abs=1e-12)
    uwo = best_of_n(scaled.mean(2) - 0.5 * scaled.var(2), gold, [1, 2, 4, 8])
    assert [r["gold"] for r in probes(run, "uwo")] == pytest.approx(uwo.gold.mean(1).tolist(), rel=1e-9)
    total = best_of_n(members.mean(2), gold, [1, 2, 4, 8])
    assert [r["gold"] for r in probes(run, "total")] == pytest.approx(total.gold.mean(1).tolist(), rel=1e-9)
    at = probes(run, "single")[-1]
    z = (at["gold"] - gold.mean()) / gold.std(ddof=1)
    assert at["gold_z"] == pytest.approx(z, rel=1e-9)


def test_examples_are_the_best_of_the_first_n(run):
    members, gold = arrays(run)
    texts = [row["response"] for row in rows(run / "responses.jsonl")[1:]]
    samples = records.read_samples(next((run / "curves").glob("*-total")))
    assert len(samples) == 4 * 5
    for row in samples:
        best = int(members[row["prompt_index"], : row["n"]].mean(-1).argmax())
        assert row["picked"] == best
        assert row["response"] == texts[8 * row["prompt_index"] + best]
        assert row["gold"] == pytest.approx(gold[row["prompt_index"], best], rel=1e-6)


def test_the_report_measures_the_expectation_and_not_the_example(run):
    for method in report.load([run]):
        label = method.label.removeprefix("best-of-n, ")
        first, *_, last = probes(run, label)
        assert method.outcome.final_gold.value == pytest.approx(last["gold_z"] - first["gold_z"], rel=1e-9)
        assert method.curve.bound
        assert method.curve.sqrt_kl[-1] == pytest.approx(kl_bound(8) ** 0.5, rel=1e-12)
        assert method.curve.gold.low[0] == method.curve.gold.high[0]  # a gain over itself is surely 0
        assert method.law.fit.form == "bon"


def test_neither_the_batch_nor_a_torn_line_changes_the_samples(run, tmp_path):
    assert bon(tmp_path, batch_size=3) == 0
    other = tmp_path / "version_0"
    whole = (run / "responses.jsonl").read_bytes()
    assert (other / "responses.jsonl").read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    kept = b"".join(lines[:20])
    (other / "responses.jsonl").write_bytes(kept + lines[20][:-9])
    scored = (other / "scores" / "two.jsonl").read_bytes().splitlines(keepends=True)
    (other / "scores" / "two.jsonl").write_bytes(b"".join(scored[:7]) + scored[7][:5])
    (other / "gold.jsonl").unlink()
    assert bon(tmp_path, "--resume", "last") == 0
    assert (other / "responses.jsonl").read_bytes() == whole
    again = arrays(other)
    for mine, theirs in zip(again, arrays(run), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_finished_run_takes_new_rewards_and_grids_without_new_samples(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "version_0")
    before = (tmp_path / "version_0" / "responses.jsonl").stat().st_mtime_ns
    changes = {
        "rewards": CONFIG["rewards"] | {"alone": PROXY},
        "selectors": {"alone": {"reward": "alone"}},
        "ns": [1, 3, 7],
    }
    assert bon(tmp_path, "--resume", tmp_path / "version_0", **changes) == 0
    shown = capsys.readouterr().out
    assert "scores by alone: all" in shown
    assert "scores by two: all" not in shown
    assert (tmp_path / "version_0" / "responses.jsonl").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "version_0" / "curves").iterdir()] == ["00-alone"]
    assert [r["n"] for r in probes(tmp_path / "version_0", "alone")] == [1, 3, 7]
    members, gold = arrays(run)
    expected = best_of_n(members[..., 0], gold, [1, 3, 7]).gold.mean(1)
    assert [r["gold"] for r in probes(tmp_path / "version_0", "alone")] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.slow
def test_a_killed_process_is_continued_to_the_same_end(run, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"out": str(tmp_path), "batch_size": 1}))
    command = [sys.executable, "train.py", "bon", "--config", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    file = tmp_path / "version_0" / "responses.jsonl"
    while not (file.exists() and file.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = file.read_bytes()
    assert 5 < left.count(b"\n") < 41
    subprocess.run([*command, "--resume", "last"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert file.read_bytes().startswith(left[: left.rindex(b"\n") + 1])
    assert file.read_bytes() == (run / "responses.jsonl").read_bytes()


def test_equal_responses_tie_and_kl_says_so(tmp_path):
    assert bon(tmp_path, sampling={"max_new_tokens": 1}) == 0
    found = rows(tmp_path / "version_0" / "responses.jsonl")[1:]
    for _, group in itertools.groupby(found, key=lambda row: row["prompt_index"]):
        texts = [(row["response"], row["same_as"]) for row in group]
        for i, (text, first) in enumerate(texts):
            assert first == [t for t, _ in texts].index(text) <= i
    repeated = sum(row["same_as"] != row["sample_index"] for row in found)
    assert repeated > 0
    assert len(rows(tmp_path / "version_0" / "gold.jsonl")) - 1 == len(found) - repeated
    first, *_, last = probes(tmp_path / "version_0", "mean")
    assert last["kl_empirical"] < last["kl_bound"] - 0.05
    assert first["gold"] == pytest.approx(arrays(tmp_path / "version_0")[1].mean(), rel=1e-9)


def test_the_written_config_runs_again(run, tmp_path):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    assert main(["bon", "--config", str(tmp_path / "again.yaml"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "version_0" / "responses.jsonl").read_bytes() == (run / "responses.jsonl").read_bytes()


def test_the_shipped_config_is_read_and_flags_go_before_it(tmp_path):
    command = ["bon", "--config", str(ROOT / "configs" / "bon.yaml"), "--out", str(tmp_path)]
    assert main([*command, "--n_prompts", "2", "--n_samples", "4", "--sampling.max_new_tokens", "4"]) == 0
    names = sorted(path.name for path in (tmp_path / "version_0" / "curves").iterdir())
    assert names == ["00-single", "01-mean", "02-wco", "03-uwo"]


def test_without_gold_the_proxy_alone_is_drawn(tmp_path, capsys):
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"tell me about number {i}"}) + "\n" for i in range(5)))
    assert bon(tmp_path, "--prompts", data, "--n_samples", "4") == 0
    assert "no gold scorer is configured" in capsys.readouterr().out
    last = probes(tmp_path / "version_0", "mean")[-1]
    assert last["gold"] is last["gold_z"] is last["win_rate"] is None
    assert last["proxy_z"] > 0
    assert "best-of-n, mean" in report.html(report.load([tmp_path / "version_0"]), "title")


def test_the_report_tells_best_of_n_apart_and_needs_no_torch(run, tmp_path):
    out = tmp_path / "report.html"
    trained = [
        {"method": "dpo", "label": "dpo", "seed": 0, "config_hash": "a", "step": s, "kl_k1": s, "gold": s, "gold_z": s}
        for s in range(4)
    ]
    records.append(tmp_path / "dpo" / records.PROBE, trained)
    code = (
        "import sys; from lit_rlhf.front import main;"
        f"status = main(['report', {str(run)!r}, {str(tmp_path / 'dpo')!r}, '-o', {str(out)!r}]);"
        "assert status == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "best-of-n, uwo" in done.stdout
    page = out.read_text()
    assert "(analytic bound) of best-of-n" in page
    assert "√KL to the reference" in page
    assert "before (best of 1)" in page
    assert "after (best of 8)" in page
    assert page.count("<svg") >= 2


MISTAKES = {
    "unknown key": (["--frob", "1"], ["frob"]),
    "wrong type": (["--n_samples", "many"], ["n_samples", "many"]),
    "no samples": (["--n_samples", "0"], ["n_samples", "0"]),
    "no prompts": (["--n_prompts", "0"], ["n_prompts must be >= 1, got 0"]),
    "grid too far": (["--ns", "[1, 9]"], ["ns", "8", "[1, 9]"]),
    "grid without 1": (["--ns", "[2, 4]"], ["ns", "[2, 4]"]),
    "temperature": (["--sampling.temperature", "0"], ["temperature must be > 0, got 0"]),
    "no such policy": (["--policy", "{tmp}/none"], ["{tmp}/none"]),
    "a reward model": (["--policy", "builtin:proxy-0"], ["builtin:proxy-0", "reward model"]),
    "no such data": (["--prompts", "{tmp}/none.jsonl"], ["none.jsonl"]),
    "no such config": (["--config", "{tmp}/none.yaml"], ["none.yaml"]),
    "nothing to resume": (["--resume", "last"], ["--resume last", "{tmp}"]),
    "no run folder": (["--resume", "{tmp}"], ["{tmp}", "no run folder"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_message_and_status_2(name, tmp_path, capfd):
    arguments, expected = MISTAKES[name]
    assert bon(tmp_path, *(a.format(tmp=tmp_path) for a in arguments)) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    for word in expected:
        assert word.format(tmp=tmp_path) in message, message
    assert not list(tmp_path.glob("version_*"))


BROKEN = {
    "unknown reward": ({"selectors": {"a": {"reward": "three"}}}, ["selectors.a.reward", "'three'", "two"]),
    "bad label": ({"selectors": {"a/b": {"reward": "two"}}}, ["'a/b'"]),
    "bad reward name": ({"rewards": {"a/b": PROXY}, "selectors": None}, ["rewards", "'a/b'"]),
    "no rewards": ({"rewards": {}, "selectors": None}, ["rewards", "none"]),
    "no members": (
        {"rewards": {"two": PROXY}, "selectors": {"wco": {"reward": "two", "by": "each_member"}}},
        ["selectors.wco", "'two' has no members"],
    ),
    "bad aggregator": ({"selectors": {"a": {"reward": "two", "by": "median"}}}, ["median"]),
    "no such reward model": (
        {"rewards": {"two": PROXY | {"init_args": {"path": "builtin:proxy-9"}}}, "selectors": None},
        ["builtin:proxy-9"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_configs_end_before_anything_is_drawn(name, tmp_path, capfd):
    changes, expected = BROKEN[name]
    assert bon(tmp_path, **changes) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    for word in expected:
        assert word in message, message
    assert not list(tmp_path.glob("version_*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sampling": {"max_new_tokens": 10, "temperature": 0.7}}, "`sampling.temperature` was 1.0 when"),
        ({"n_samples": 9}, "`n_samples` was 8 when this file was made and is 9 now"),
        ({"seed": 1}, "`seed` was 0"),
        ({"rewards": {"two": PROXY}, "selectors": {"a": {"reward": "two"}}}, "two.jsonl: `scorer.class_path` was"),
        ({"gold": PROXY}, "gold.jsonl: `scorer.class_path` was 'lit_rlhf.data.world_gold.WorldGold'"),
    ],
)
def test_a_changed_config_is_not_resumed(run, tmp_path, capsys, changes, expected):
    shutil.copytree(run, tmp_path / "version_0")
    assert bon(tmp_path, "--resume", "last", **changes) == 2
    assert expected in capsys.readouterr().err


def scorer(path, **more):
    return {"class_path": PROXY["class_path"], "init_args": {"path": str(path), "batch_size": 4} | more}


def test_changed_weights_are_not_resumed_and_a_changed_batch_is(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from lit_rlhf.assets import resolve

    shutil.copytree(resolve("builtin:proxy-0"), tmp_path / "rm")
    small = {"n_prompts": 2, "n_samples": 2, "selectors": None}
    assert bon(tmp_path, rewards={"rm": scorer(tmp_path / "rm")}, **small) == 0
    before = (tmp_path / "version_0" / "scores" / "rm.jsonl").read_bytes()
    assert bon(tmp_path, "--resume", "last", rewards={"rm": scorer(tmp_path / "rm", batch_size=2)}, **small) == 0
    assert (tmp_path / "version_0" / "scores" / "rm.jsonl").read_bytes() == before
    (file,) = (tmp_path / "rm").glob("*.safetensors")
    weights = load_file(file)
    weights["score.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    capsys.readouterr()
    assert bon(tmp_path, "--resume", "last", rewards={"rm": scorer(tmp_path / "rm")}, **small) == 2
    assert "hash of the weights" in capsys.readouterr().err


def test_another_policy_under_the_same_name_is_not_resumed(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from lit_rlhf.assets import resolve

    shutil.copytree(resolve("builtin:policy"), tmp_path / "policy")
    small = {"n_prompts": 2, "n_samples": 2, "policy": str(tmp_path / "policy")}
    assert bon(tmp_path, **small) == 0
    (file,) = (tmp_path / "policy").glob("*.safetensors")
    weights = load_file(file)
    save_file({name: value * 1.5 for name, value in weights.items()}, file, {"format": "pt"})
    capsys.readouterr()
    assert bon(tmp_path, "--resume", "last", **small) == 2
    assert "hash of the policy's weights" in capsys.readouterr().err


def test_labels_keep_runs_apart_and_a_new_run_never_writes_into_an_old_one(tmp_path):
    small = {"n_prompts": 2, "n_samples": 2, "rewards": {"rm": PROXY}, "selectors": None}
    assert bon(tmp_path, label="first", **small) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "version_0").rglob("*.jsonl")}
    assert bon(tmp_path, label="second", **small) == 0
    assert (tmp_path / "version_1" / "responses.jsonl").is_file()
    assert before == {file: file.read_bytes() for file in (tmp_path / "version_0").rglob("*.jsonl")}
    assert [m.label for m in report.load([tmp_path])] == ["first, best-of-n, rm", "second, best-of-n, rm"]
    (only,) = (tmp_path / "version_0" / "curves").iterdir()
    assert [(row["proxy_std"], row["proxy_members"]) for row in records.read_probe(only)] == [(None, None)] * 2


HASHED = {
    "policy": {"policy": "runs/other"},
    "prompts": {"prompts": "other.jsonl"},
    "split": {"split": "test"},
    "gold": {"gold": PROXY},
    "where gold lies": {"gold": OTHER},
    "ns": {"ns": [1, 3]},
    "sampling": {"sampling": {"temperature": 0.5}},
    "reward": {"rewards": {"two": {"class_path": "a.Other", "init_args": {}}}},
}
ALIKE = {
    "seed": {"seed": 7},
    "where a seed's reward model lies": {"rewards": {"two": scorer("elsewhere")}},
    "how fast": {"rewards": {"two": scorer("here", batch_size=99, device="cuda")}},
    "folder": {"out": "elsewhere"},
}


def test_what_tells_runs_apart_in_a_report():
    samples = SimpleNamespace(prompts=[0])
    given = {
        "policy": "builtin:policy", "prompts": "builtin:world", "split": "validation", "n_samples": 8, "ns": [1, 2],
        "sampling": {}, "standardise": "overall", "rewards": {"two": scorer("here")}, "gold": None, "seed": 0,
        "label": None, "out": "runs",
    }  # fmt: skip

    def digest(changes):
        return _about("mean", Selector("two"), given | changes, samples)["config_hash"]

    assert {digest(changes) for changes in ALIKE.values()} == {digest({})}
    found = [digest({}), *(digest(changes) for changes in HASHED.values())]
    assert len(set(found)) == len(found)


def test_another_aggregator_of_an_ensemble_costs_no_new_scores(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "version_0")
    worst = CONFIG["rewards"]["two"]["init_args"] | {"aggregator": "lit_rlhf.functional.aggregation.WorstCase"}
    rewards = {"two": CONFIG["rewards"]["two"] | {"init_args": worst}}
    assert bon(tmp_path, "--resume", "last", rewards=rewards, selectors={"total": {"reward": "two"}}) == 0
    assert "scores by two: all" not in capsys.readouterr().out
    members, gold = arrays(run)
    expected = best_of_n(members.min(2), gold, [1, 2, 4, 8])
    found = probes(tmp_path / "version_0", "total")
    assert [row["gold"] for row in found] == pytest.approx(expected.gold.mean(1).tolist(), rel=1e-9)
    assert [row["proxy"] for row in found] == pytest.approx(expected.proxy.mean(1).tolist(), rel=1e-6)


def test_what_a_scorer_reads_is_compared_too(tmp_path):
    references, router = tmp_path / "references.jsonl", tmp_path / "router"
    router.mkdir()

    def written(text):
        references.write_text(text)
        (router / "config.json").write_text(text)
        return [source_of(TextOverlap(str(references))), source_of(Ensemble([Routed(str(router))]))]

    first = written('{"prompt": "a", "response": "b"}')
    assert written('{"prompt": "a", "response": "b"}') == first
    assert all(new != old for new, old in zip(written('{"prompt": "a", "response": "c"}'), first, strict=True))


class Routed(Scorer):
    """Names a router as a DMoERM does."""

    def __init__(self, router: str) -> None:
        self.router = router

    def score(self, prompts, responses, categories=None):
        raise NotImplementedError


def test_responses_are_read_once_however_many_selectors_there_are(run, tmp_path, monkeypatch):
    """Once to see what is there, and once for numbers and places; texts that are shown are read by place."""
    shutil.copytree(run, tmp_path / "version_0")
    read, passes = Stream.placed, []

    def counted(stream):
        passes.append(stream.path.name)
        return read(stream)

    monkeypatch.setattr(Stream, "placed", counted)
    selectors = {f"s{i}": {"reward": "two"} for i in range(5)}
    assert bon(tmp_path, "--resume", "last", selectors=selectors) == 0
    assert passes.count("responses.jsonl") == 2


def test_uncertainty_without_weight_is_the_mean_from_config_to_record(run, tmp_path):
    shutil.copytree(run, tmp_path / "version_0")
    kind = "lit_rlhf.functional.aggregation.UncertaintyWeighted"
    by = {
        name: {"class_path": kind, "init_args": {"coefficient": c}} for name, c in {"none": 0.0, "much": 50.0}.items()
    }
    selectors = {"mean": CONFIG["selectors"]["mean"]} | {name: {"reward": "two", "by": b} for name, b in by.items()}
    assert bon(tmp_path, "--resume", "last", selectors=selectors) == 0
    mean, none, much = ([row["gold"] for row in probes(tmp_path / "version_0", name)] for name in selectors)
    assert none == mean != much


def test_changed_prompts_are_not_resumed(tmp_path, capsys):
    data = tmp_path / "own.jsonl"
    for last in (4, 5):
        lines = [{"prompt": f"tell me about number {i}"} for i in (0, 1, 2, 3, last)]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        more = ["--resume", "last"] if last == 5 else []
        assert bon(tmp_path, "--prompts", data, "--n_samples", "2", *more) == (2 if more else 0)
    assert "hash of the prompts" in capsys.readouterr().err


def test_a_stream_refuses_a_broken_line_inside(tmp_path):
    stream = Stream(tmp_path / "a.jsonl", {"x": (1, 2)})
    stream.append([{"i": i} for i in range(3)])
    assert [row["i"] for row in Stream(tmp_path / "a.jsonl", {"x": [1, 2]})] == [0, 1, 2]
    places = [place for place, _ in stream.placed()]
    assert [row["i"] for row in stream.at([places[2], places[0]])] == [2, 0]
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace('{"i": 1}', '{"i": '))
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: expected a JSON object"):
        list(stream)
    with pytest.raises(UserError, match=r"`x` was \[1, 2\] when this file was made and is 3 now"):
        Stream(tmp_path / "a.jsonl", {"x": 3})


def test_a_stream_forgets_a_torn_line_of_any_length(tmp_path):
    path = tmp_path / "a.jsonl"
    Stream(path, {}).append([{"i": 0}])
    whole = path.read_bytes()
    for torn in (b"{", b'{"long": "' + b"x" * 200_000):
        path.write_bytes(whole + torn)
        assert list(Stream(path, {})) == [{"i": 0}]
        assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"i": 1}')  # all but its newline
    assert list(Stream(path, {})) == [{"i": 0}, {"i": 1}]
    path.write_bytes(whole[:5])
    assert list(Stream(path, {})) == []


def test_progress_speaks_while_one_step_takes_long():
    said = []
    with Progress("things", 10, 4, seconds=0.01, say=said.append) as progress:
        while len(said) < 3:
            time.sleep(0.001)
        progress.add(3)
        while "7 of 10" not in said[-1]:
            time.sleep(0.001)
    assert said[0] == "things: 4 of 10 done"
    assert "4 of 10 (40%)" in said[1]
    assert "under way" in said[1]
    assert "left" in said[-2]
    assert said[-1].startswith("things: all 10 done")


def test_standardising_takes_offsets_away():
    rng = np.random.default_rng(0)
    members = rng.normal(size=(4, 6, 3)) * [1, 2, 5] + [0, 10, -3]
    overall = standardise(members, "overall", "r")
    np.testing.assert_allclose(overall.mean((0, 1)), 0, atol=1e-12)
    np.testing.assert_allclose(overall.reshape(-1, 3).std(0, ddof=1), 1, rtol=1e-12)
    prompt = standardise(members + rng.normal(size=(4, 1, 3)), "prompt", "r")
    np.testing.assert_allclose(prompt, standardise(members, "prompt", "r"), rtol=1e-9)
    np.testing.assert_allclose(prompt.mean(1), 0, atol=1e-12)
    assert standardise(members, "raw", "r") is members
    members[..., 1] = 7
    with pytest.raises(UserError, match=r"rewards\.r: member 1 gives all samples one score"):
        standardise(members, "overall", "r")


def test_uncertainty_zero_is_the_mean_and_single_is_no_mean():
    rng = np.random.default_rng(1)
    scores = Columns(rng.normal(size=(3, 5)), rng.normal(size=(3, 5, 4)))
    (zero,), _ = rankings(Selector("r", UncertaintyWeighted(0.0)), scores, "overall")
    (mean,), _ = rankings(Selector("r", Mean()), scores, "overall")
    np.testing.assert_array_equal(zero, mean)
    alone, members = rankings(Selector("r", "each_member"), scores, "overall")
    assert len(alone) == 4
    gold = rng.normal(size=(3, 5))
    expected = np.mean([best_of_n(members[..., k], gold, [3]).gold for k in range(4)], axis=0)
    np.testing.assert_allclose(Grid(alone, [3]).expect(gold), expected, rtol=1e-12)
    assert rankings(Selector("r"), scores, "overall")[0][0] is scores.total


def test_help_is_at_hand(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bon", "--help"])
    assert stop.value.code == 0
    assert "--n_samples" in capsys.readouterr().out
    assert main([]) == 0
    assert "configs/bon.yaml" in capsys.readouterr().out
