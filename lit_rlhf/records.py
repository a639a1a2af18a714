"""The record files of a run folder: JSON lines that survive a kill, a resume and a copy of the folder.

A line is a record of one probe (`probe.jsonl`), of one sampled response of a probe (`samples.jsonl`), or of one
validation of a reward model (`reward.jsonl`). Files only grow, except when a run resumes: lines past the step of its
checkpoint belong to a future that is about to be lived again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lit_rlhf.errors import UserError

Record = dict[str, Any]

PROBE = "probe.jsonl"
SAMPLES = "samples.jsonl"
REWARD = "reward.jsonl"
_ODD = "backslashreplace"  # half a surrogate pair has no UTF-8, but its escape is good JSON
_PLACES = {"seed", "model_name_or_path", "tokenizer", "train", "validation", "test", "path"}
_ROW_KEY = ("step", "n", "prompt_index", "sample_index")
_BLOCK = 1 << 16


def read(path: str | Path) -> list[Record]:
    """Read JSON lines; a torn last line, left by a kill while it was written, is ignored.

    Raises:
        UserError: the file is missing, or a line before the last is no JSON object.
    """
    return list(stream(path))


def stream(path: str | Path) -> Iterator[Record]:
    """Read JSON lines one by one, as `read` does, for files that are larger than memory.

    Raises:
        UserError: as `read`, the moment that such a line is reached.
    """
    return (record for _, record in placed(path))


def placed(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Read JSON lines one by one, each with the byte at which it begins, so that `at` finds it again.

    Raises:
        UserError: as `stream`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    place, odd = 0, ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode(errors="replace").strip()
            if text and odd:
                raise UserError(f"{path}, {odd}")
            record = _parse(text)
            if record is not None:
                yield place, record
            elif text:
                odd = f"line {number}: expected a JSON object, got {text[:80]!r}"  # forgiven if it is the last
            place += len(line)


def at(path: str | Path, places: Iterable[int]) -> Iterator[Record]:
    """Read the records that begin at these bytes, as `placed` gave them, and no others."""
    with Path(path).open("rb") as file:
        for place in places:
            file.seek(place)
            yield json.loads(file.readline().decode(errors="replace"))


def natural(path: str | Path) -> tuple[tuple[str | int, ...], ...]:
    """Return a key that sorts paths as people count: `version_9` before `version_10`."""
    pieces = (re.split(r"(\d+)", part) for part in Path(path).parts)
    return tuple(tuple(int(p) if i % 2 else p for i, p in enumerate(piece)) for piece in pieces)


def files(folders: Sequence[str | Path], name: str) -> list[Path]:
    """Find the files called `name` in folders or, where a folder lacks it, under it, each once.

    Folders come in the order given, and what differs by a last number alone by that number, since a shell's
    `version_*` puts 10 before 9.
    """
    found = []
    for folder in map(Path, folders):
        here = folder / name
        found += [here] if here.is_file() else sorted(folder.rglob(name), key=natural)
    families: dict[Path, int] = {}
    places = {file: families.setdefault(_family(file), len(families)) for file in found}
    return sorted(places, key=lambda file: (places[file], natural(file)))


def _family(file: Path) -> Path:
    return file.parent.parent / file.parent.name.rstrip("0123456789")


def read_probe(folder: str | Path) -> list[Record]:
    """Read the probe records of a run folder by rising step (or `n`, for best-of-n); the last record of a step wins.

    Raises:
        UserError: as `read`.
    """
    return _latest(read(Path(folder) / PROBE))


def read_samples(folder: str | Path) -> list[Record]:
    """Read the sampled responses of a run folder, by step, prompt and sample; the last of each wins, none without file.

    Raises:
        UserError: as `read`.
    """
    path = Path(folder) / SAMPLES
    return _latest(read(path)) if path.is_file() else []


def append(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records in one write, after mending a torn last line.

    Raises:
        ValueError: a number is not finite, which JSON cannot say.
    """
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mend(path)
    with path.open("a", encoding="utf-8", errors=_ODD) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """End a file, if there is one, with a newline: after its last line if that is whole, else in place of it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = _last_newline(file, size)
        if end == size:
            return
        file.seek(end)
        if _parse(file.read().decode(errors="replace")) is None:
            file.truncate(end)
        else:
            file.write(b"\n")


def resume(folder: str | Path, step: int) -> list[Record]:
    """Make the record files of a run folder end at `step`, where training goes on, and return the probe records kept.

    Args:
        folder: the run folder.
        step: optimizer steps already taken; at 0 the run is new and nothing is kept.
    """
    for name in (PROBE, SAMPLES, REWARD):
        path = Path(folder) / name
        if path.is_file():
            found = read(path)
            kept = [record for record in found if step > 0 and record["step"] <= step]
            if len(kept) < len(found):
                _replace(path, kept)
    return read_probe(folder) if (Path(folder) / PROBE).is_file() else []


def config_hash(*parts: Mapping[str, Any]) -> str:
    """Name a configuration by twelve hexadecimal digits that neither seeds nor places on a disk change.

    Left out, by name alone so that the same configuration has one hash everywhere: keys that start with an underscore,
    `seed`, `*_seed`, and keys that say where a model or data lies (`model_name_or_path`, `tokenizer`, `train`,
    `validation`, `test`, `path`, `*_path` but `class_path`, `*_dir`). Runs on other models or data therefore need a
    label of their own. What is no plain data counts by its class.
    """
    text = json.dumps([_hashable(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _hashable(v) for k, v in value.items() if not _left_out(str(k))}
    if isinstance(value, list | tuple):
        return [_hashable(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _left_out(name: str) -> bool:
    if name == "class_path":  # says what, not where
        return False
    return name in _PLACES or name.startswith("_") or name.endswith(("_seed", "_path", "_dir"))


def _latest(records: list[Record]) -> list[Record]:
    places = {tuple(record.get(name, -1) for name in _ROW_KEY): record for record in records}
    return [places[place] for place in sorted(places)]


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _last_newline(file: IO[bytes], size: int) -> int:
    """Return where the last line that ends in a newline ends; read from behind, since files may be large."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _replace(path: Path, records: list[Record]) -> None:
    _swap(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(errors=_ODD))


def _swap(path: Path, content: bytes) -> None:
    """Put new content in place of a file at once, so that a kill leaves the old or the new and nothing between."""
    draft = path.with_suffix(".draft")
    draft.write_bytes(content)
    draft.replace(path)
