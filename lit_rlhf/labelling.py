"""Labels for pairs: which response a gold reward prefers, with a stated share of wrong labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lit_rlhf.errors import UserError
from lit_rlhf.types import Scorer


def label_pairs(
    rows: Sequence[dict[str, Any]], gold: Scorer, noise: float, seed: int, aspect_noise: float = 0.0
) -> list[dict[str, Any]]:
    """Return the pairs with `chosen` the one that `gold` scores higher, except in a share `noise` of them.

    Exactly round(noise x pairs) labels are flipped, drawn once from a generator of their own; every row keeps
    `flipped` and both gold scores. Pairs with equal scores carry no preference and are left out. `aspects`,
    `aspects_soft`, `votes` and `scores` turn with the responses; a `margin`, which measured another label, is dropped.
    A share `aspect_noise` of all aspects that say 1 or -1 is flipped too, with its `aspects_soft`, whatever the pair's
    own label.

    Raises:
        UserError: a noise outside [0, 0.5].
    """
    for name, share in {"noise": noise, "aspect_noise": aspect_noise}.items():
        if not 0 <= share <= 0.5:
            raise UserError(f"{name} must be in [0, 0.5], the share of wrong labels; got {share}")
    prompts = [row["prompt"] for row in rows]
    categories = [row.get("category") for row in rows]
    first = gold.score(prompts, [row["chosen"] for row in rows], categories).total.tolist()
    second = gold.score(prompts, [row["rejected"] for row in rows], categories).total.tolist()
    kept = [entry for entry in zip(rows, first, second, strict=True) if entry[1] != entry[2]]
    flips = set(np.random.default_rng(seed).permutation(len(kept))[: round(noise * len(kept))].tolist())
    labelled = [_labelled(row, a, b, flipped=i in flips) for i, (row, a, b) in enumerate(kept)]
    _flip_aspects(labelled, aspect_noise, seed)
    return labelled


def _exchanged(found: dict[str, Any]) -> dict[str, Any]:
    names = {"chosen": "rejected", "rejected": "chosen"}
    return {names.get(name, name): value for name, value in found.items()}


def _against(soft: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if chance is None else 1 - chance for name, chance in soft.items()}


# what faces the other way when the responses change places
_TURNED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "aspects": lambda found: {name: value and -value for name, value in found.items()},
    "aspects_soft": _against,
    "votes": _exchanged,
    "scores": _exchanged,
}


def _labelled(row: dict[str, Any], first: float, second: float, *, flipped: bool) -> dict[str, Any]:
    swap = (second > first) != flipped
    chosen, rejected = (row["rejected"], row["chosen"]) if swap else (row["chosen"], row["rejected"])
    scores = (second, first) if swap else (first, second)
    labelled = row | {"chosen": chosen, "rejected": rejected, "flipped": flipped}
    labelled.pop("margin", None)  # of another label, by how much it was better
    if swap:
        labelled |= {key: turn(row[key]) for key, turn in _TURNED.items() if row.get(key) is not None}
    return labelled | {"gold": {"chosen": scores[0], "rejected": scores[1]}}


def _flip_aspects(rows: list[dict[str, Any]], noise: float, seed: int) -> None:
    """Flip exactly round(noise x labels) of the aspect labels, drawn from a generator apart from that of the pairs."""
    places = [(i, name) for i, row in enumerate(rows) for name, value in (row.get("aspects") or {}).items() if value]
    order = np.random.default_rng([seed, 1]).permutation(len(places))
    for place in order[: round(noise * len(places))]:
        i, name = places[place]
        rows[i]["aspects"] = rows[i]["aspects"] | {name: -rows[i]["aspects"][name]}
        soft = rows[i].get("aspects_soft") or {}
        if name in soft:
            rows[i]["aspects_soft"] = soft | _against({name: soft[name]})
