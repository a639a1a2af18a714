"""Record files: torn lines, repeated steps, resumed runs, and hashes that group seeds."""

import json
import subprocess
import sys

import pytest

from lit_rlhf import records
from lit_rlhf.errors import UserError


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "new" / records.PROBE
    records.append(path, [{"step": 0, "text": "é\n\u2028\ud800"}])
    records.append(path, [{"step": 5}])
    assert records.read(path) == [{"step": 0, "text": "é\n\u2028\ud800"}, {"step": 5}]


def test_the_last_record_of_a_step_wins_and_steps_rise(tmp_path):
    records.append(tmp_path / records.PROBE, [{"step": 5, "x": 1}, {"step": 0}, {"step": 5, "x": 2}])
    assert records.read_probe(tmp_path) == [{"step": 0}, {"step": 5, "x": 2}]


def test_best_of_n_records_are_told_apart_by_n(tmp_path):
    records.append(tmp_path / records.PROBE, [{"n": 4}, {"n": 1}, {"n": 4, "x": 1}])
    assert records.read_probe(tmp_path) == [{"n": 1}, {"n": 4, "x": 1}]


def test_samples_are_told_apart_by_prompt_and_sample(tmp_path):
    rows = [{"step": 0, "prompt_index": i, "sample_index": j} for i in range(2) for j in range(2)]
    records.append(tmp_path / records.SAMPLES, [*rows, rows[0] | {"x": 1}])
    assert records.read_samples(tmp_path) == [rows[0] | {"x": 1}, *rows[1:]]
    assert records.read_samples(tmp_path / "none") == []


@pytest.mark.parametrize("tail", ['{"step": 9, "x', "{", '{"step"', '"', "[1]"])
def test_a_torn_last_line_is_ignored_and_mended(tmp_path, tail):
    path = tmp_path / records.PROBE
    path.write_text('{"step": 0}\n' + tail)
    assert records.read(path) == [{"step": 0}]
    records.append(path, [{"step": 5}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0}, {"step": 5}]


def test_a_line_torn_inside_a_letter(tmp_path):
    path = tmp_path / records.PROBE
    path.write_bytes(b'{"step": 0}\n{"text": "\xc3')
    assert records.read(path) == [{"step": 0}]
    records.append(path, [{"step": 5}])
    assert records.read(path) == [{"step": 0}, {"step": 5}]


def test_a_long_file_is_mended_at_its_end_alone(tmp_path):
    """Lines that are longer than what is read at once, and blocks that end in and beside a newline."""
    path = tmp_path / records.PROBE
    for size in (3 * records._BLOCK, records._BLOCK - 1, records._BLOCK, records._BLOCK + 1):
        whole = b"".join(b'{"text": "%s"}\n' % (letter * size) for letter in (b"a", b"b"))
        for torn in (b"", b"{", b'{"text": "' + b"c" * size):
            path.write_bytes(whole + torn)
            records.mend(path)
            assert path.read_bytes() == whole
        path.write_bytes(whole + b'{"text": "' + b"c" * size + b'"}')
        records.mend(path)
        assert [record["text"][0] for record in records.stream(path)] == ["a", "b", "c"]
    path.write_bytes(b"{" * (2 * records._BLOCK))
    records.mend(path)
    assert path.read_bytes() == b""
    records.mend(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_stream_gives_records_before_it_meets_a_broken_line(tmp_path):
    path = tmp_path / records.PROBE
    path.write_text('{"step": 0}\n\n{"step": 5}\n{"ste\n{"step": 9}\n')
    found = records.stream(path)
    assert [next(found), next(found)] == [{"step": 0}, {"step": 5}]
    with pytest.raises(UserError, match=r"probe\.jsonl, line 4: expected a JSON object, got '{\"ste'"):
        next(found)


def test_records_are_found_again_by_place(tmp_path):
    path = tmp_path / records.PROBE
    rows = [{"text": text} for text in ("a", "é\n\u2028", "\ud800", "d")]
    records.append(path, rows)
    places = [place for place, _ in records.placed(path)]
    assert list(records.at(path, [places[3], places[1], places[2], places[1]])) == [rows[3], rows[1], rows[2], rows[1]]


def make(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_files_come_by_folder_and_versions_as_people_count(tmp_path):
    every = [tmp_path / "dpo" / f"version_{k}" / "x" for k in (1, 9, 10)]
    make(*every, tmp_path / "b" / "x", tmp_path / "b" / "in" / "x")
    assert records.files([tmp_path / "dpo"], "x") == every
    by_shell = sorted(str(file.parent) for file in every)
    assert by_shell[1].endswith("version_10")
    assert records.files(by_shell, "x") == every
    assert records.files([tmp_path / "b", tmp_path / "dpo", tmp_path / "b"], "x") == [tmp_path / "b" / "x", *every]
    assert records.files([tmp_path / "dpo", tmp_path / "b"], "x") == [*every, tmp_path / "b" / "x"]
    assert records.files([tmp_path], "nothing") == []


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / records.PROBE
    path.write_text('{"step": 0}\n{"step": 5}')
    records.append(path, [{"step": 10}])
    assert [r["step"] for r in records.read(path)] == [0, 5, 10]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / records.PROBE
    path.write_text('{"step": 0}\n{"ste\n{"step": 5}\n')
    with pytest.raises(UserError, match=r"probe\.jsonl, line 2: expected a JSON object"):
        records.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        records.read_probe(tmp_path)


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.append(tmp_path / records.PROBE, [{"x": float("nan")}])


def test_a_resumed_run_keeps_its_past_alone(tmp_path):
    for name in (records.PROBE, records.SAMPLES):
        records.append(tmp_path / name, [{"step": step, "update": step} for step in (0, 5, 10, 15)])
    assert [r["step"] for r in records.resume(tmp_path, 10)] == [0, 5, 10]
    assert [r["step"] for r in records.read_samples(tmp_path)] == [0, 5, 10]
    assert records.resume(tmp_path, 0) == []
    assert records.resume(tmp_path / "none", 7) == []


def hashed(**changes):
    return records.config_hash({"loss": {"class_path": "a.DPO", "init_args": {"beta": 0.1}}, "_x": 1} | changes)


@pytest.mark.parametrize(
    "key",
    ["seed", "split_seed", "model_name_or_path", "tokenizer", "train", "validation", "test", "path", "reward_path",
     "cache_dir", "save_dir", "_x"],
)  # fmt: skip
def test_seeds_and_places_leave_the_hash_alone(key):
    assert hashed(**{key: "a"}) == hashed(**{key: "b"})
    assert hashed(inner={key: ["a"]}) == hashed(inner={})


def test_what_changes_results_changes_the_hash():
    names = [
        hashed(), hashed(loss={"class_path": "a.DPO", "init_args": {"beta": 0.2}}), hashed(max_steps=3),
        hashed(loss={"class_path": "a.IPO", "init_args": {"beta": 0.1}}), hashed(training="x"), hashed(directory="x"),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert hashed(x=object()) == hashed(x=object())


def test_the_hash_does_not_look_at_the_disk(tmp_path, monkeypatch):
    """The same words mean the same where a file of that name happens to lie."""
    monkeypatch.chdir(tmp_path)
    before = hashed(dtype="float32")
    (tmp_path / "float32").touch()
    assert hashed(dtype="float32") == before


def test_reading_records_needs_no_torch():
    code = "import sys, lit_rlhf.records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
