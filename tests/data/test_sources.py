"""Every kind of source gives the same rows, and every bad row is named by file, line, key and value."""

import gzip
import json

import pytest

from lit_rlhf.data.rows import Origin, Record, normalise, preference_rows, prompt_rows, ranked_row, sft_rows
from lit_rlhf.data.sources import read
from lit_rlhf.types import UserError

ROWS = [
    {"prompt": "the cat", "chosen": "sat", "rejected": "ran", "id": i, "aspects": {"tone": 1, "fact": 0}}
    for i in range(3)
]
USER = {"role": "user", "content": "who ran?"}
DOG = {"role": "assistant", "content": "the dog"}
CAT = {"role": "assistant", "content": "the cat"}


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parse(parser, **values):
    return parser(Record(Origin("rows.jsonl", 7), values))


# -- reading ---------------------------------------------------------------------------------------------------------


def test_json_lines_zipped_or_not(tmp_path):
    plain = write(tmp_path / "rows.jsonl")
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, zipped):
        records = list(read(str(path)))
        assert [dict(r.values) for r in records] == ROWS
        assert [str(r.origin) for r in records] == [f"{path}:{n}" for n in (1, 2, 3)]


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([*ROWS, {**ROWS[0], "aspects": None}]), path)
    records = list(read(str(path)))
    assert [dict(r.values) for r in records[:3]] == ROWS
    assert str(records[3].origin) == f"{path}:4"
    assert preference_rows(records[3])[0].aspects == {}


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\n\n  \n{"prompt": "b"}')
    assert [(r.values["prompt"], r.origin.line) for r in read(str(path))] == [("a", 1), ("b", 4)]


def test_folder_by_the_words_in_file_names(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", ROWS[:1])
    write(tmp_path / "data" / "dev.jsonl", ROWS[1:2])
    write(tmp_path / "hard.jsonl", ROWS[2:])
    (tmp_path / "README.md").write_text("no data")

    def ids(source, split):
        return [r.values["id"] for r in read(source, split)]

    assert ids(str(tmp_path), "train") == [0]
    assert ids(str(tmp_path), "validation") == [1]
    assert ids(f"{tmp_path}#hard", "train") == [2]
    with pytest.raises(UserError, match=r"'extra'.*hard\.jsonl"):
        ids(f"{tmp_path}#extra", "train")
    with pytest.raises(UserError, match="'test'"):
        ids(str(tmp_path), "test")


def test_folder_without_split_names_is_training_data(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[1:])
    write(tmp_path / "a.jsonl", ROWS[:1])
    assert [r.values["id"] for r in read(str(tmp_path))] == [0, 1, 2]


def test_saved_data_set(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "many")
    assert [r.values["id"] for r in read(str(tmp_path / "one"))] == [0, 1, 2]
    records = list(read(str(tmp_path / "many"), "validation"))
    assert [str(r.origin) for r in records] == [f"{tmp_path / 'many'}#test:1"]
    assert [r.values["id"] for r in read(f"{tmp_path / 'many'}#train", "validation")] == [0, 1, 2]
    with pytest.raises(UserError, match="'other'; it has train, test"):
        list(read(f"{tmp_path / 'many'}#other"))


@pytest.mark.parametrize("name", ["rows.jsonl", "sub/rows.parquet", "./rows", "a/b/c", "nobody/nothing"])
def test_missing_sources_are_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=name):
        list(read(name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"prompt": 1}\n' * 6 + b'{"prompt": "x",\n', r"rows\.jsonl:7: broken JSON.*'\{\"prompt\""),
        ("rows.jsonl", b'{"prompt": 1}\n["a"]\n', r"rows\.jsonl:2: the line is.*expected a JSON object"),
        ("rows.jsonl", b"", r"rows\.jsonl: the file holds no rows"),
        ("rows.jsonl", b"\n \n", r"rows\.jsonl: the file holds no rows"),
        ("rows.jsonl", b'{"prompt": "\xff"}\n', r"rows\.jsonl: cannot be read after line 0"),
        ("rows.jsonl.gz", b"not zipped", r"rows\.jsonl\.gz: cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], r"rows\.jsonl\.gz: cannot be read"),
        ("rows.parquet", b"not parquet", r"rows\.parquet: cannot be read as Parquet"),
        ("rows.csv", b"prompt,chosen\n", r"rows\.csv: unknown kind of file; expected one of \.jsonl"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read(str(tmp_path / name)))


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=f"{tmp_path}: the folder holds no data files"):
        list(read(str(tmp_path)))


# -- rows ------------------------------------------------------------------------------------------------------------


def test_preference_row_with_everything():
    votes = {"chosen": 3, "rejected": 1, "tie": 1}
    aspects = {"tone": 1, "fact": -1, "style": 0, "length": None}
    (row,) = parse(preference_rows, **ROWS[0] | {"margin": 2, "category": "qa", "aspects": aspects, "votes": votes})
    assert (row.prompt, row.chosen, row.rejected, row.margin, row.category) == ("the cat", "sat", "ran", 2.0, "qa")
    assert row.aspects == {"tone": 1, "fact": -1}
    assert row.preference == pytest.approx(3.5 / 5)
    assert str(row.origin) == "rows.jsonl:7"


def test_preference_row_without_extras():
    (row,) = parse(preference_rows, prompt="the cat", chosen="sat", rejected="ran", votes=None, category=None)
    assert (row.margin, row.category, row.aspects, row.preference) == (0.0, None, {}, None)


def test_shared_messages_are_the_prompt():
    (row,) = parse(preference_rows, chosen=[USER, DOG], rejected=[USER, CAT])
    assert (row.prompt, row.chosen, row.rejected) == ([USER], "the dog", "the cat")
    (same,) = parse(preference_rows, prompt=[USER], chosen=[DOG], rejected=[CAT])
    (repeated,) = parse(preference_rows, prompt="who ran?", chosen=[USER, DOG], rejected=[USER, CAT])
    (strings,) = parse(preference_rows, prompt=[USER], chosen="the dog", rejected="the cat")
    assert row == same == repeated == strings
    (wrapped,) = parse(preference_rows, prompt="who ran?", chosen=[DOG], rejected=[CAT])
    assert wrapped == row
    (longer,) = parse(preference_rows, chosen=[USER, DOG, USER, DOG], rejected=[USER, DOG, USER, CAT])
    assert longer.prompt == [USER, DOG, USER]
    (equal,) = parse(preference_rows, chosen=[USER, DOG], rejected=[USER, DOG])
    assert (equal.prompt, equal.chosen) == ([USER], "the dog")


def test_ranked_rows_become_the_pairs_of_unequal_rank():
    values = {"prompt": "p", "responses": ["b", "a", "c", "b2"], "rank": [2, 1, 3, 2], "category": "qa"}
    pairs = [(r.chosen, r.rejected) for r in parse(preference_rows, **values)]
    assert sorted(pairs) == [("a", "b"), ("a", "b2"), ("a", "c"), ("b", "c"), ("b2", "c")]
    assert parse(ranked_row, **values).rank == (2.0, 1.0, 3.0, 2.0)


def test_sft_rows_of_every_kind():
    (row,) = parse(sft_rows, prompt="the cat", response="sat")
    assert (row.prompt, row.response) == ("the cat", "sat")
    (text,) = parse(sft_rows, text="the cat sat")
    assert (text.prompt, text.response, text.group) == ("", "the cat sat", "the cat sat")
    (pair,) = parse(sft_rows, **ROWS[0])
    assert (pair.prompt, pair.response) == ("the cat", "sat")
    first, second = parse(sft_rows, messages=[USER, DOG, USER, CAT])
    assert (first.prompt, first.response) == ([USER], "the dog")
    assert (second.prompt, second.response) == ([USER, DOG, USER], "the cat")
    assert first.group == second.group


def test_prompt_rows_ignore_the_rest():
    assert parse(prompt_rows, prompt="the cat", chosen=3)[0].prompt == "the cat"
    assert parse(prompt_rows, chosen=[USER, DOG], rejected=[USER, CAT])[0].prompt == [USER]


def test_normalised_prompts():
    assert normalise(" The  cat\n") == normalise("the cat") != normalise("the cats")
    assert normalise([USER]) == "user: who ran?"


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("parser", "values", "message"),
    [
        (
            preference_rows,
            {"prompt": "p", "chosen": "a"},
            "`rejected` is missing.*non-empty string.*has: prompt, chosen",
        ),
        (preference_rows, {}, "`prompt` is missing"),
        (preference_rows, {"chosen": "a", "rejected": "b"}, "`prompt` is missing"),
        (preference_rows, GOOD | {"chosen": ""}, "`chosen` is ''; expected a non-empty string"),
        (preference_rows, GOOD | {"rejected": " \n"}, "`rejected` is ' .*non-empty"),
        (preference_rows, GOOD | {"rejected": 5}, "`rejected` is 5; expected a non-empty string"),
        (preference_rows, GOOD | {"prompt": 5}, "`prompt` is 5; expected a string or a list of messages"),
        (preference_rows, GOOD | {"prompt": []}, "`prompt` is .*non-empty list of messages"),
        (preference_rows, GOOD | {"prompt": ["hi"]}, "message 1 to have a `role`"),
        (preference_rows, GOOD | {"prompt": [{"role": "bot", "content": "x"}]}, "system, user, assistant, not 'bot'"),
        (preference_rows, GOOD | {"prompt": [USER, {"role": "user"}]}, "message 2 to have a string as `content`"),
        (preference_rows, GOOD | {"prompt": [USER, DOG]}, "last message that is not the assistant's"),
        (preference_rows, {"chosen": [USER, DOG], "rejected": "b"}, "`rejected` is 'b'; expected a non-empty list"),
        (preference_rows, {"chosen": [USER, DOG, DOG], "rejected": [USER, CAT]}, "`chosen` .*one non-empty assistant"),
        (preference_rows, {"chosen": [DOG], "rejected": [CAT]}, "`prompt` is missing"),
        (preference_rows, GOOD | {"margin": "big"}, "`margin` is 'big'; expected a finite number"),
        (preference_rows, GOOD | {"margin": float("nan")}, "`margin` is nan"),
        (preference_rows, GOOD | {"category": 3}, "`category` is 3; expected a string"),
        (preference_rows, GOOD | {"aspects": {"tone": 2}}, "`aspects` is .*1, 0 or -1"),
        (preference_rows, GOOD | {"votes": {"chosen": -1}}, "`votes` is .*at least 0"),
        (preference_rows, GOOD | {"votes": {"chosen": 0}}, "`votes` is .*not all of them 0"),
        (preference_rows, GOOD | {"votes": 3}, "`votes` is 3; expected an object"),
        (preference_rows, {"prompt": "p", "responses": ["a"], "rank": [1]}, "`responses` is .*at least two"),
        (preference_rows, {"prompt": "p", "responses": ["a", ""], "rank": [1, 2]}, "`responses` is"),
        (preference_rows, {"prompt": "p", "responses": ["a", "b"], "rank": [1]}, "`rank` is .*list of 2 numbers"),
        (preference_rows, {"prompt": "p", "responses": ["a", "b"]}, "`rank` is missing"),
        (preference_rows, {"prompt": "p", "responses": ["a", "b"], "rank": [1, 1]}, "two different ranks"),
        (sft_rows, {"prompt": "p"}, "`response` is missing"),
        (sft_rows, {"prompt": "p", "response": ""}, "`response` is ''"),
        (sft_rows, {"response": "a"}, "`prompt` is missing.*`messages`, or `text`"),
        (sft_rows, {"text": " "}, "`text` is ' '"),
        (sft_rows, {"messages": "hi"}, "`messages` is 'hi'"),
        (sft_rows, {"messages": [USER]}, "an assistant message that follows"),
        (sft_rows, {"messages": [USER, DOG | {"content": ""}]}, "non-empty answer in message 2"),
        (prompt_rows, {"text": "a"}, "`prompt` is missing"),
    ],
)
def test_bad_rows_are_named(parser, values, message):
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: " + f".*{message}"):
        parse(parser, **values)


def test_long_values_are_shortened():
    with pytest.raises(UserError) as caught:
        parse(preference_rows, **GOOD | {"category": ["word"] * 1000})
    assert len(str(caught.value)) < 150
