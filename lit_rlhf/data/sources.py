"""Where rows come from: JSONL, JSONL.gz, Parquet, a folder of these, a saved or hub data set, or the built-in world."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.data.rows import Origin, Record
from lit_rlhf.types import UserError

WORLD = "builtin:world"
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "test"),
    "test": ("test", "testing"),
}
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what `datasets.save_to_disk` leaves
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read(source: str, split: str = "train") -> Iterator[Record]:
    """Read the rows of a file, folder or hub data set, one by one.

    Args:
        source: a path or a hub id; `#NAME` at the end picks the split of a folder or data set that is called NAME.
        split: which split to take where `source` has several and names none: train, validation or test.

    Raises:
        UserError: nothing there, not readable, or a line that is no JSON object.
    """
    place, _, name = (source, "", "") if Path(source).expanduser().exists() else source.partition("#")
    path = Path(place).expanduser()
    if path.is_dir() and not any((path / mark).is_file() for mark in _SAVED):
        for file in _files(path, name, split):
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    elif not path.exists() and (place.endswith(SUFFIXES) or path.is_absolute() or not _HUB_ID.fullmatch(place)):
        raise UserError(f"{place}: no such file or folder; expected {', '.join(SUFFIXES)}, a folder, or a hub id")
    else:
        yield from _data_set(place, name, split, saved=path.is_dir())


def _read_file(path: Path) -> Iterator[Record]:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    rows = _parquet(path) if path.suffix == ".parquet" else _lines(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: the file holds no rows")
    yield first
    yield from rows


def _lines(path: Path) -> Iterator[Record]:
    opened = gzip.open if path.suffix == ".gz" else open
    line = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:  # -sig drops a byte-order mark
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield _record(Origin(str(path), line), text)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read after line {line} ({error}); expected UTF-8 JSON lines") from error


def _record(origin: Origin, text: str) -> Record:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        shown = text.strip()[:60]
        raise UserError(
            f"{origin}: broken JSON, {error.msg} at column {error.colno} in {shown!r}; expected one object a line"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{origin}: the line is {text.strip()[:60]!r}; expected a JSON object")
    return Record(origin, values)


def _parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Record(Origin(str(path), number), row)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error})") from error


def _files(folder: Path, name: str, split: str) -> list[Path]:
    """Return the data files of a split, found by the words in their names; without any such word, all are `train`."""
    found = sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES))
    if not found:
        raise UserError(f"{folder}: the folder holds no data files; expected {', '.join(SUFFIXES)}")
    words = {path: set(re.split(r"[^a-z0-9]+", path.name.lower())) for path in found}
    known = {word for names in SPLITS.values() for word in names}
    if not name and split == "train" and not any(known & w for w in words.values()):
        return found
    for wanted in (name.lower(),) if name else SPLITS[split]:
        chosen = [path for path in found if wanted in words[path]]
        if chosen:
            return chosen
    names = ", ".join(path.name for path in found)
    raise UserError(f"{folder}: no file is called after the split {name or split!r}; the folder holds {names}")


def _data_set(place: str, name: str, split: str, *, saved: bool) -> Iterator[Record]:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(place) if saved else datasets.load_dataset(place)
    except Exception as error:  # hub, network and builder errors come in a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place!r} is no file or folder here, and cannot be loaded as a data set from the hub ({reason})"
            if not saved
            else f"{place}: the saved data set cannot be loaded ({reason})"
        ) from error
    label, rows = _pick(place, loaded, name, split) if isinstance(loaded, Mapping) else (place, loaded)
    if not len(rows):
        raise UserError(f"{label}: the data set holds no rows")
    for number, row in enumerate(rows, 1):
        yield Record(Origin(label, number), row)


def _pick(place: str, splits: Mapping[str, Any], name: str, split: str) -> tuple[str, Any]:
    for wanted in (name,) if name else SPLITS[split]:
        if wanted in splits:
            return f"{place}#{wanted}", splits[wanted]
    have = ", ".join(splits)
    raise UserError(f"{place!r} has no split {name or split!r}; it has {have}. Write {place}#SPLIT to pick one")
