"""Prints gold against n over the seeds of `best_of_n.smk`: `python -m studies.best_of_n RUN_FOLDER...`.

Gold is in standard deviations of all samples of a seed, above their mean; every number is a mean over seeds with its
95 % t-interval. The last lines are differences within a seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.functional.curves import interval


def shown(values: Sequence[float]) -> str:
    """Return mean and half-width; a single seed has no interval."""
    mean, half = interval(values)
    return f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def main(folders: Sequence[str]) -> None:
    """Print the curves and what each rule gains over a single member."""
    seeds: list[dict[str, Any]] = [json.loads((Path(f) / "summary.json").read_text()) for f in folders]
    ns, labels = seeds[0]["ns"], list(seeds[0]["labels"])
    gains = {label: [seed["labels"][label]["gain"] for seed in seeds] for label in labels}
    print(f"{len(seeds)} seeds; best of n by: " + ", ".join(labels))
    for i, n in enumerate(ns):
        print(
            f"n = {n:4d}, KL bound {seeds[0]['kl_bound'][i]:.2f}: "
            + "  ".join(shown([g[i] for g in gains[k]]) for k in labels)
        )
    single = gains[labels[0]]
    print(f"{labels[0]}, n = {ns[-1]} less its best n: {shown([g[-1] - max(g) for g in single])}")
    for label in labels[1:]:
        above = [
            [e - s for e, s in zip(ensemble, alone, strict=True)]
            for ensemble, alone in zip(gains[label], single, strict=True)
        ]
        print(
            f"{label} less {labels[0]}: "
            + "  ".join(f"n {n} {shown([seed[i] for seed in above])}" for i, n in enumerate(ns))
        )


if __name__ == "__main__":
    main(sys.argv[1:])
