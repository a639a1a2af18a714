"""The report: what it says, what it survives, and how it looks to a real browser."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_rlhf import records, report
from lit_rlhf.errors import UserError

ROOT = Path(__file__).parent.parent
EVIL = (
    """</script><script>document.title = "owned"</script><img src=x onerror="document.title='owned'">'"`{{ 7 * 7 }}"""
)


def make_run(
    folder, *, label="dpo", seed=0, beta=0.5, points=9, digest="abc", gold=True, proxy=True, events=True, text=EVIL
):
    """A run whose gold follows 2 d (1 - beta log d), in units of 2 per sd, with a steadily rising proxy."""
    folder.mkdir(parents=True)
    config = f"model:\n  beta: {beta}\n  note: {text}\n"
    (folder / "config.yaml").write_text(config)
    for step in range(points):
        d = 0.45 * step
        wobble = 0.04 * math.sin(7 * step + 3 * seed) if step else 0.0
        height = d * (1 - beta * math.log(d)) + wobble if d else 0.0
        record = {
            "method": "dpo", "label": label, "seed": seed, "config_hash": digest, "step": 10 * step, "kl_k1": d**2,
            "gold": 5 + 2 * height if gold else None, "gold_se": 0.1 if gold else None,
            "gold_z": height if gold else None, "win_rate": 0.5 + 0.1 * height if gold else None,
            "proxy": 3 * d if proxy else None, "proxy_se": 0.2 if proxy else None,
            "proxy_z": 1.4 * d if proxy else None, "n_samples": 8, "sampling": {"temperature": 1.0},
        }  # fmt: skip
        records.append(folder / records.PROBE, [record])
        rows = [
            {
                "step": 10 * step, "prompt_index": i, "sample_index": 0, "prompt": f"Question {i}? {text}",
                "response": f"Answer at step {10 * step}. {text}",
                "gold": 5 + 2 * height + (i - 3.5) / 9 if gold else None,
                "proxy": 3 * d if proxy else None, "kl_k1": d**2, "length": 5, "ended": True,
            }
            for i in range(8)
        ]  # fmt: skip
        records.append(folder / records.SAMPLES, rows)
    if events:
        write_events(folder, seed)
    return folder


def write_events(folder, seed):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step in range(30):
        values = {"loss": 0.7 / (1 + step) + 0.01 * seed, "val/rewards/margins": 0.1 * step, "logps/chosen": -40 - step,
                  "rewards/accuracies": 0.5 + step / 100, "gold/score": 1.0, "odd <tag> & more": step}  # fmt: skip
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    writer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    small = [make_run(root / f"small-{s}", label="DPO, β 0.02 <b>", seed=s, beta=0.9, digest="s") for s in range(3)]
    return [
        *small,
        make_run(root / "rpo", label='RPO $x_{ & "q"', beta=0.4, digest="r"),
        make_run(root / "ipo", label="_ipo", beta=0.1, digest="i"),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    report.main([*map(str, runs), "-o", str(path), "--title", f"Title {EVIL}"])
    return path


def test_everything_written_by_models_and_users_is_escaped(page):
    text = page.read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>" not in text
    assert text.count("&lt;script&gt;") > 40
    assert "&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert "odd &lt;tag&gt; &amp; more" in text
    assert "$x_{ &amp;" in text


def test_it_is_one_file_with_unique_ids(page):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "url(http" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(used) <= set(ids)


def test_colours_follow_the_page(page):
    drawings = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(drawings) > 8
    colours = set(re.findall(r"#[0-9a-f]{6}\b", " ".join(drawings)))
    assert colours == set()
    assert "var(--series-2)" in drawings[0]


def test_seeds_group_and_the_table_tells(runs, page):
    table = report.table_text(runs)
    assert [line.split("  ")[0] for line in table.splitlines()[2:5]] == ["DPO, β 0.02 <b>", 'RPO $x_{ & "q"', "_ipo"]
    methods = report.load(runs)
    assert [len(m.runs) for m in methods] == [3, 1, 1]
    first = methods[0].outcome
    # d (1 - 0.9 log d) at the probes: highest at d = 0.9 or 1.35 (0.985, 0.985), last at 3.6 (-0.55)
    assert first.peak_gold.value == pytest.approx(0.98, abs=0.06)
    assert first.final_gold.value == pytest.approx(3.6 * (1 - 0.9 * math.log(3.6)), abs=0.06)
    assert first.drop.value == pytest.approx(1 - first.final_gold.value / first.peak_gold.value, rel=1e-9)
    assert first.final_kl.value == pytest.approx(3.6**2, rel=1e-9)
    assert first.peak_gold.half is not None
    assert methods[1].outcome.peak_gold.half is None
    law = methods[0].curve.fit
    assert law.peak_kl == pytest.approx(math.exp(2 / 0.9 - 2), rel=0.1)
    assert "The largest loss after a peak" in page.read_text()


def test_laws_come_with_intervals_and_rivals(runs, page):
    text = page.read_text()
    fit = report.load(runs)[0].law.fit
    low, high = fit.peak_kl_interval
    assert f"<td>{fit.peak_kl:.1f} [{low:.1f}, {high:.1f}]" in text
    assert "resamples<br>without peak" in text
    assert "Which law predicts best" in text
    assert report._within(1.0, (0.5, math.inf)) == "1.00 [0.50, ∞]"
    assert report._within(None, None) == "none"
    assert report._within(4e14, (-1e5, 4e17), ".1f") == ">9999 [-100000.0, >9999]"


def test_a_peak_outside_the_data_is_marked(tmp_path):
    runs = [make_run(tmp_path / "far", beta=0.05, events=False), make_run(tmp_path / "near", label="near", beta=0.9)]
    methods = report.load(runs)
    assert [method.law.fit.extrapolated for method in methods] == [True, False]
    text = report.html(methods, "title")
    assert len(re.findall(r"\] \*</td>", text)) == 1


def test_a_run_that_gained_nothing_says_so(tmp_path):
    make_run(tmp_path / "down", beta=-0.5, points=1)
    flat = [{"step": s, "kl_k1": s, "gold": 1 - s, "gold_z": -s, "gold_se": 0.1} for s in range(3)]
    records.append(tmp_path / "flat" / records.PROBE, flat)
    lines = report.table_text([tmp_path / "flat", tmp_path / "down"]).splitlines()
    assert "no gain" in lines[2]
    assert "no gain" not in lines[3]
    assert "<td>no gain</td>" in report.html(report.load([tmp_path / "flat"]), "t")


def test_a_parent_folder_stands_for_its_runs_and_a_rerun_replaces(runs, tmp_path):
    assert len(report.load([runs[0].parent])) == 3
    make_run(tmp_path / "a", seed=1)
    later = make_run(tmp_path / "b", seed=1)
    (method,) = report.load([tmp_path])
    assert [run.folder for run in method.runs] == [later]
    assert method.replaced == [tmp_path / "a"]


def test_a_replaced_run_is_named(tmp_path, capsys):
    for name in ("a", "b"):
        make_run(tmp_path / name, seed=1, events=False, points=3)
    make_run(tmp_path / "c", seed=2, events=False, points=3)
    report.main([str(tmp_path), "-o", str(tmp_path / "report.html")])
    said = f"a later run has its label, configuration and seed: {tmp_path}"
    assert [line for line in capsys.readouterr().out.splitlines() if said in line] == [f"left out, since {said}/a"]
    assert (tmp_path / "report.html").read_text().count(said) == 1


def test_version_10_is_later_than_version_9(tmp_path):
    runs = [make_run(tmp_path / f"version_{k}", seed=1, events=False, points=2) for k in (9, 10)]
    for folders in ([tmp_path], runs, runs[::-1]):
        (method,) = report.load(folders)
        assert [run.folder for run in method.runs] == [runs[1]]


def test_equal_labels_of_different_configurations_are_told_apart(tmp_path):
    make_run(tmp_path / "a", digest="1111111111")
    make_run(tmp_path / "b", digest="2222222222")
    assert [m.label for m in report.load([tmp_path])] == ["dpo (111111)", "dpo (222222)"]


@pytest.mark.parametrize(
    "options",
    [
        {"gold": False},
        {"proxy": False},
        {"gold": False, "proxy": False},
        {"points": 1},
        {"points": 2},
        {"events": False},
    ],
)
def test_poor_runs_render(tmp_path, options):
    folder = make_run(tmp_path / "run", **options)
    report.main([str(folder), "-o", str(tmp_path / "r.html")])
    assert "</html>" in (tmp_path / "r.html").read_text()


def test_a_run_that_never_left_kl_0_and_has_no_files_beside_renders(tmp_path):
    rows = [{"method": "ppo", "step": step, "kl_k1": 0.0, "gold": 1.0, "gold_z": None} for step in range(3)]
    records.append(tmp_path / "run" / records.PROBE, rows)
    text = report.html(report.load([tmp_path / "run"]), "t")
    assert "Nothing to draw" in text
    assert "kept no samples" in text
    flat = [row | {"gold_z": 0.0, "gold_se": 0.0, "kl_k1": -0.01} for row in rows]
    records.append(tmp_path / "flat" / records.PROBE, flat)
    assert "<svg" in report.html(report.load([tmp_path / "flat"]), "t")


def test_messages_and_best_of_n_and_torn_files_render(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = records.read_samples(folder)
    for row in rows:
        row["prompt"] = [{"role": "user", "content": "Hi <b>"}]
    records.append(folder / records.SAMPLES, rows)
    for name in (records.PROBE, records.SAMPLES):
        with (folder / name).open("a") as file:
            file.write('{"step": 999, "half')
    (events,) = folder.glob("events*")
    events.write_bytes(events.read_bytes()[:-20])
    curve = [
        {"method": "bon", "n": n, "kl_bound": math.log(n) - (n - 1) / n, "gold_z": math.log(n), "gold": 1.0}
        for n in (1, 2, 4, 8)
    ]
    records.append(tmp_path / "bon" / records.PROBE, curve)
    text = report.html(report.load([folder, tmp_path / "bon"]), "t")
    assert "user: Hi &lt;b&gt;" in text
    assert "after (step 80)" in text


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"expected a run folder with probe\.jsonl"):
        report.main([str(tmp_path)])
    (tmp_path / records.PROBE).write_text('{"torn')
    with pytest.raises(UserError, match="expected at least one probe record"):
        report.main([str(tmp_path)])


def test_no_torch_is_needed(runs, tmp_path):
    arguments = json.dumps([*map(str, runs), "-o", str(tmp_path / "r.html")])
    code = (
        f"import sys; from lit_rlhf import report; report.main({arguments});"
        "heavy = {'torch', 'lightning', 'transformers', 'matplotlib.pyplot'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    return path


def browse(chromium, page, folder):
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--window-size=1600,1000", "--virtual-time-budget=2000", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.browser
def test_a_browser_opens_it_without_a_word(chromium, page, tmp_path):
    done = browse(chromium, page, tmp_path)
    assert "CONSOLE" not in done.stderr
    assert "<title>owned" not in done.stdout
    assert "Gold and proxy against KL" in done.stdout


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 768, 1400])
def test_no_page_scrolls_sideways_and_no_planted_script_runs(chromium, page, tmp_path, width):
    """In a frame, since windows have a least width; the content policy is taken out, so that escaping stands alone."""
    lifted = re.sub(r"<meta http-equiv.*?>", "", page.read_text())
    size = "[innerWidth, document.documentElement.scrollWidth, document.title].join(' ')"
    (tmp_path / "inner.html").write_text(lifted.replace("</body>", f"<script>document.title = {size}</script></body>"))
    title = "document.querySelector('iframe').contentDocument.title"
    (tmp_path / "outer.html").write_text(
        f"<body><iframe src=inner.html style='width:{width}px;height:900px;border:0'></iframe>"
        f"<script>onload = () => document.body.dataset.found = {title}</script></body>"
    )
    found = re.search(r'data-found="(\d+) (\d+) Title', browse(chromium, tmp_path / "outer.html", tmp_path).stdout)
    assert found
    inner, content = map(int, found.groups())
    assert inner == width
    assert content <= inner
