"""What the report's sections and the commands' tables share: padded text, and the environment of the templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lit_rlhf.functional.curves import interval

if TYPE_CHECKING:
    from jinja2 import Environment


def padded(lines: Sequence[Sequence[str]], *, left: int = 1, ruled: bool = True) -> str:
    """Return a table as plain text, its columns two spaces apart.

    Args:
        lines: the heads, then the rows, all of one length.
        left: how many of the first columns stand to the left; the others, as numbers, to the right.
        ruled: a line of dashes under the heads.
    """
    clean = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    sides: list[Callable[[str, int], str]] = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    rows = [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in clean
    ]
    return "\n".join([rows[0], *(["-" * len(rows[0])] if ruled else []), *rows[1:]])


def printable(text: str) -> str:
    """Return text that cannot move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def over_seeds(values: Sequence[float], style: str = ".3f") -> str:
    """Show the mean over seeds, with its 95 % interval where there are several."""
    middle, half = interval(values)
    return format(middle, style) + ("" if half is None else f" ± {format(half, style.removeprefix('+'))}")


def environment() -> Environment:
    """Return the environment of the report's templates: what users and models wrote is escaped, a typo is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lit_rlhf"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
