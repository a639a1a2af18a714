"""What best-of-n keeps on disk while it works: JSON lines that only grow, and say in their first line what made them.

A killed run leaves at most one torn line, which is mended when the file is opened again; whole lines are never redone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any, Self

from lit_rlhf import records
from lit_rlhf.errors import UserError

Row = records.Record
HARMLESS = ("batch_size", "device")  # of a scorer: they change rounding at most


class Stream:
    """A file of rows in a fixed order, made by one configuration.

    Args:
        path: the file; made if absent.
        made_by: what determines the rows, as plain data; a file that something else made is refused.
        instead: what to do then.

    Raises:
        UserError: the file was made by another configuration, or is no file of this kind.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], instead: str = "start a new run") -> None:
        self.path = path
        records.mend(path)
        head = next(records.stream(path), None) if path.exists() else None
        expected = json.loads(json.dumps({"made_by": made_by}))  # tuples become lists, as they do in the file
        if head is None:
            records.append(path, [expected])
        elif head != expected:
            raise UserError(f"{path}: {_difference(head.get('made_by'), expected['made_by'])}; {instead}")

    def __iter__(self) -> Iterator[Row]:
        """Read the rows one by one."""
        return (row for _, row in self.placed())

    def placed(self) -> Iterator[tuple[int, Row]]:
        """Read the rows one by one, each with its place in the file."""
        return islice(records.placed(self.path), 1, None)

    def at(self, places: Iterable[int]) -> Iterator[Row]:
        """Read the rows at these places alone."""
        return records.at(self.path, places)

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows for good."""
        records.append(self.path, rows)


def lasting(described: Any) -> Any:
    """Return a scorer's description without what says how fast it works and not what it gives."""
    if isinstance(described, list):
        return [lasting(item) for item in described]
    if not isinstance(described, dict):
        return described
    return {key: lasting(item) for key, item in described.items() if key not in HARMLESS}


class Progress:
    """Says how far a piece of work is every few seconds, also while a single step of it takes long.

    Args:
        what: that is counted.
        total: of them.
        done: before this run.
        seconds: between two lines.
        say: writes a line.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, *, seconds: float = 3.0, say: Callable[[str], None] | None = None
    ) -> None:
        self.what, self.total, self.done, self._before, self._seconds = what, total, done, done, seconds
        self._say = say or (lambda line: print(line, flush=True))
        self._finished, self._started = Event(), monotonic()
        self._thread = Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        self._say(f"{self.what}: {self.done:,} of {self.total:,} done" if self.done else f"{self.what}: {self.total:,}")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()
        self._thread.join()
        if error[0] is None and self.done > self._before:
            self._say(f"{self.what}: all {self.total:,} done in {monotonic() - self._started:.0f} s")

    def add(self, count: int) -> None:
        """Count some as done."""
        self.done += count

    def _repeat(self) -> None:
        while not self._finished.wait(self._seconds):
            self._say(self.line())

    def line(self) -> str:
        """Return what there is to say now."""
        spent, made = monotonic() - self._started, self.done - self._before
        share = f"{self.what}: {self.done:,} of {self.total:,} ({self.done / max(1, self.total):.0%}), {spent:.0f} s"
        if made == 0:
            return f"{share}, the first are under way"
        rate = made / spent
        return f"{share}, {rate:,.0f} a second, about {(self.total - self.done) / rate:.0f} s left"


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say how to go on, should the work be interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; go on with the same command and --resume {folder}", flush=True)
        raise


def new_folder(out: str) -> Path:
    """Make the next `version_K` under a folder."""
    taken = [int(p.name[8:]) for p in Path(out).glob("version_*") if p.name[8:].isdigit()]
    folder = Path(out) / f"version_{max(taken, default=-1) + 1}"
    folder.mkdir(parents=True)
    return folder


def old_folder(out: str, resume: str, sign: str) -> Path:
    """Find the run folder to continue: a path, or "last" for the newest under `out`; it has a file called `sign`.

    Raises:
        UserError: there is none.
    """
    if resume == "last":
        found = [p for p in Path(out).glob("version_*") if p.name[8:].isdigit() and (p / sign).is_file()]
        if not found:
            raise UserError(f"--resume last: no run folder with {sign} under {out!r}")
        return max(found, key=lambda p: int(p.name[8:]))
    if not (Path(resume) / sign).is_file():
        raise UserError(f"--resume: {resume!r} is no run folder of this command, it holds no {sign}")
    return Path(resume)


def _difference(there: Any, here: Any, name: str = "") -> str:
    """Name the first key in which two plain descriptions differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    return f"`{name}` was {there!r} when this file was made and is {here!r} now"
