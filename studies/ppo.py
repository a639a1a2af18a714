"""Prints what the seeds of `ppo.smk` say: `python -m studies.ppo FOLDER`, the folder that the study wrote.

Every number is a mean over seeds with its 95 % t-interval. Gold and proxy are in standard deviations of the samples of
step 0; "late" is the mean over the last quarter of the probes, since one probe's sampling noise is 0.07.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import TypeVar

from lit_rlhf import records
from lit_rlhf.functional.curves import interval
from lit_rlhf.records import Record
from lit_rlhf.report import table_text

T = TypeVar("T")
Runs = dict[int, list[Record]]  # seed to probes
DISTANCES = (2, 5, 10, 20, 40)  # nats
THIRDS = 3
FALL = 0.3  # of the gain, which counts as over-optimised


def late(values: Sequence[T], share: int = 4) -> Sequence[T]:
    """Return the last quarter of some values, or another share."""
    return values[-max(1, len(values) // share) :]


def peak_to_end(runs: Runs, key: str) -> list[float]:
    """Return by how much a number moved from the probe of highest gold to the last, for each seed."""
    return [p[-1][key] - max(p, key=lambda r: float(r["gold"]))[key] for p in runs.values()]


def fallen(runs: Runs) -> int:
    """Count the seeds whose gold lost `FALL` of its gain or more."""
    drops = [(max(r["gold_z"] for r in p), p[-1]["gold_z"]) for p in runs.values()]
    return sum(top > 0 and (top - end) / top >= FALL for top, end in drops)


def gold_at(probes: Sequence[Record], kl: float) -> float | None:
    """Return gold where a run first spent so many nats, between two probes in proportion; None where it never did."""
    for before, after in pairwise(probes):
        if before["kl_k1"] < kl <= after["kl_k1"]:
            share = (kl - before["kl_k1"]) / (after["kl_k1"] - before["kl_k1"])
            return float(before["gold_z"] + share * (after["gold_z"] - before["gold_z"]))
    return None


def thirds(probes: Sequence[Record]) -> list[float]:
    """Return mean gold in the first, second and last third of a run; the probe of step 0 is left out."""
    golds = [r["gold_z"] for r in probes[1:]]
    cuts = [round(len(golds) * i / THIRDS) for i in range(THIRDS + 1)]
    return [fmean(golds[a:b]) for a, b in pairwise(cuts)]


def fall(probes: Sequence[Record]) -> float:
    """Return by how much gold ends below its highest probe."""
    return max(float(r["gold_z"]) for r in probes) - float(probes[-1]["gold_z"])


def falls_compared(single: Runs, ensemble: Runs) -> str:
    """Return how much less gold falls on an ensemble than on one member, seed by seed, and its lead at equal KL."""
    seeds = sorted(single.keys() & ensemble.keys())
    gains = [fall(single[seed]) - fall(ensemble[seed]) for seed in seeds]
    one, worst = (shown([fall(runs[seed]) for seed in seeds]) for runs in (single, ensemble))
    less = f"fall {one} on one member, {worst} on the ensemble: less by {shown(gains)}, in {_share(gains)}"
    for kl in DISTANCES:
        pairs = [(gold_at(single[seed], kl), gold_at(ensemble[seed], kl)) for seed in seeds]
        more = [b - a for a, b in pairs if a is not None and b is not None]
        less += f"; at {kl} nats gold is higher by {shown(more)}, in {_share(more)}" if more else ""
    return less


def _share(gains: Sequence[float]) -> str:
    return f"{sum(gain > 0 for gain in gains)} of {len(gains)}"


def gold_by_kl(runs: Runs) -> str:
    """Return gold at some distances, over the seeds that went so far."""
    found = {kl: [g for g in (gold_at(p, kl) for p in runs.values()) if g is not None] for kl in DISTANCES}
    return "; ".join(f"{kl} nats {shown(golds)} ({len(golds)} seeds)" for kl, golds in found.items() if golds)


def constraints(runs: Runs) -> list[str]:
    """Return one line a constraint: where it is late, and how much it moves about."""
    first = next(iter(runs.values()))
    lines = []
    for name in first[0]["constraints"] or {}:
        own = [[r["constraints"][name] for r in late(probes, 2)] for probes in runs.values()]
        ratios = [fmean(c["value"] / c["threshold"] for c in late(found, 2)) for found in own]
        swings, thresholds = [pstdev(c["value"] for c in found) for found in own], [c[-1]["threshold"] for c in own]
        lines.append(f"  {name}: late value / threshold {shown(ratios)}, of {shown(thresholds)}; swing {shown(swings)}")
    return lines


def search_and_grid(searches: Runs, grid: dict[str, Runs]) -> list[str]:
    """Return late gold after the search, of the best point of the grid, and the episodes that each took."""
    lines = []
    for seed, probes in searches.items():
        points = {name: gold(runs[seed]) for name, runs in grid.items() if seed in runs}
        if points:
            best = max(points, key=lambda name: points[name])
            spent = sum(runs[seed][-1]["examples_seen"] for runs in grid.values() if seed in runs)
            lines.append(
                f"  seed {seed}: search {gold(probes):+.3f} with {probes[-1]['examples_seen']} episodes; {best}"
                f" {points[best]:+.3f} with {spent}; mean of the grid {fmean(points.values()):+.3f}"
            )
    return lines


def gold(probes: Sequence[Record]) -> float:
    """Return gold, late."""
    return fmean(r["gold_z"] for r in late(probes))


def shown(values: Sequence[float]) -> str:
    """Return mean and half-width; a single seed has no interval."""
    mean, half = interval(values)
    return f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def load(folder: Path) -> dict[str, Runs]:
    """Read the probes of all finished runs, by name and seed."""
    found: dict[str, Runs] = {}
    for done in sorted(folder.glob("seed*/*.done")):
        seed = int(done.parent.name.removeprefix("seed"))
        found.setdefault(done.stem, {})[seed] = records.read_probe(done.with_suffix("") / "version_0")
    return found


def main(folder: str) -> None:
    """Print a table of all runs, then what each shows."""
    found = load(Path(folder))
    grid = {name: runs for name, runs in found.items() if name.startswith("grid_")}
    names = [name for name in found if name not in grid]
    print(table_text([path.with_suffix("") for name in names for path in Path(folder).glob(f"seed*/{name}.done")]))
    for name in names:
        runs = found[name]
        print(f"{name}, {len(runs)} seeds: fallen by {FALL:.0%} of the gain or more in {fallen(runs)}")
        print(f"  late gold {shown([gold(p) for p in runs.values()])}, proxy from peak to end ", end="")
        print(shown(peak_to_end(runs, "proxy_z")))
        parts = zip(*map(thirds, (p for p in runs.values() if len(p) > THIRDS)), strict=True)
        print(f"  gold in thirds {', '.join(map(shown, parts))}")
        print("\n".join([f"  gold at {gold_by_kl(runs)}", *constraints(runs)]))
    for ensemble in ("few_wco", "few_uwo", "few_wco_kl"):
        if found.get("few_single", {}).keys() & found.get(ensemble, {}).keys():
            print(f"few_single, {ensemble}: {falls_compared(found['few_single'], found[ensemble])}")
    print("\n".join(search_and_grid(found.get("nelder_mead", {}), grid)))


if __name__ == "__main__":
    main(*sys.argv[1:])
