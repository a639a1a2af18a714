"""Finds thresholds for constraints in runs without them, and writes a config that training reads.

python -m studies.proxy_points individual [NAME=]RUN_FOLDER... -o thresholds.yaml
python -m studies.proxy_points joint RUN_FOLDER... -o thresholds.yaml
python train.py fit --config configs/ppo_xi.yaml --config thresholds.yaml

`individual`: runs of PPO on one reward each, several seeds of a reward are averaged; the threshold is the reward's
value at the probe of highest gold. The reward is called as in its run, or NAME, which a run with several rewards, all
but one without weight, needs. `joint`: runs that all have the same rewards, whatever their objectives; the thresholds
are the values at the top of a surface of gold over all their probes. Rewards without weight are measured too.

All runs need a GoldProbe with a gold scorer. Seeds differ in the units that each measured by its noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_rlhf import records
from lit_rlhf.errors import UserError, guarded
from lit_rlhf.functional.proxy_points import GaussianProcess, Polynomial, individual_point, joint_point
from lit_rlhf.records import Record

KINDS = ("Equal", "AtLeast", "AtMost")


def main(argv: Sequence[str]) -> None:
    """Find the points, print them, and write the config.

    Raises:
        UserError: a folder is no PPO run with gold, or the runs do not go together.
    """
    options = _parser().parse_args(argv)
    if options.how == "individual":
        thresholds = individual(options.folders, options.units)
    else:
        surface = Polynomial(options.degree) if options.surface == "polynomial" else GaussianProcess(options.pessimism)
        thresholds = joint(options.folders, options.units, surface, options.dense)
    write(options.output, thresholds, options.units, options.constraint)
    print(f"thresholds: {options.output}")


def individual(places: Sequence[str], units: str) -> dict[str, float]:
    """Return name to the reward's value at the peak of gold, over runs on one reward each."""
    groups: dict[str, list[list[Record]]] = {}
    models: dict[str, Any] = {}
    for place in places:
        name, folder = _named(place)
        found = _probes(folder)
        names = list(found[0]["reward_scale"])
        own = name if name in names else names[0]
        if own != name and len(names) > 1:
            raise UserError(f"{folder}: the run has the rewards {', '.join(names)}; expected one of them=RUN_FOLDER")
        name, model = name or own, _model(folder, own)
        if models.setdefault(name, model) != model:
            raise UserError(f"{folder}: {name} is another model than in the folders before; expected NAME={folder}")
        rows = [{"step": r["step"], "x": value(r, own, units), "y": r["gold"]} for r in found]
        groups.setdefault(name, []).append(rows)
    return {name: _peak(name, runs) for name, runs in groups.items()}


def _peak(name: str, runs: Sequence[Sequence[Record]]) -> float:
    steps = sorted(set.intersection(*({r["step"] for r in run} for run in runs)))
    if not steps:
        raise UserError(f"{name}: the runs have no step in common at which all were probed")
    tables = [{r["step"]: r for r in run} for run in runs]
    x, y = ([[table[step][key] for step in steps] for table in tables] for key in ("x", "y"))
    top, threshold, gold = individual_point(x, y)
    own = [row[int(np.argmax(golds))] for row, golds in zip(x, y, strict=True)]
    where = {0: " (gold never rose)", len(steps) - 1: " (the last probe: gold may rise further)"}.get(top, "")
    print(f"{name}: {threshold:.4f}, gold {gold:.4f} at step {steps[top]}{where}, {len(runs)} runs", end="")
    print(f", their own peaks {min(own):.4f} to {max(own):.4f}" if len(runs) > 1 else "")
    return threshold


def joint(places: Sequence[str], units: str, surface: Polynomial | GaussianProcess, dense: float) -> dict[str, float]:
    """Return name to value at the top of the surface over the probes of all runs."""
    table: list[list[float]] = []
    names: list[str] = []
    for folder in places:
        found = _probes(folder)
        own = list(found[0]["reward_scale"])
        names = names or own
        if set(own) != set(names) or len(own) < 2:
            raise UserError(
                f"{folder}: the run has the rewards {', '.join(own)}; expected several, the same in all runs"
            )
        table += [[*(value(r, name, units) for name in names), r["gold"]] for r in found]
    cells = np.array(table)
    point = joint_point(cells[:, :-1], cells[:, -1], surface, dense=dense)
    print(f"{len(table)} probes of {len(places)} runs, {surface}; gold there {point.gold:.4f}", end="")
    print(("" if point.sd is None else f" ± {point.sd:.4f} (sd)") + f", density {point.density:.2f} of the densest")
    for name, threshold in zip(names, point.values, strict=True):
        print(f"{name}: {threshold:.4f}")
    return dict(zip(names, point.values, strict=True))


def value(record: Mapping[str, Any], name: str, units: str) -> float:
    """Return the mean of a reward in a probe record, in the units of the thresholds."""
    raw = record["proxy"] if len(record["reward_scale"]) == 1 else record["proxy_by"][name]
    scale = record["reward_scale"][name]
    return float(raw if units == "raw" else (raw - scale["mean"]) / scale["std"])


def write(path: Path, thresholds: Mapping[str, float], units: str, kind: str) -> None:
    """Write a config with the constraints and their units, to be given after the run's own."""
    import yaml

    constraints = [
        {"class_path": f"lit_rlhf.functional.constrained.{kind}", "init_args": {"name": name, "threshold": threshold}}
        for name, threshold in thresholds.items()
    ]
    content = {"model": {"init_args": {"units": units, "constraints": constraints}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# Written by studies.proxy_points.\n" + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _probes(folder: str) -> list[Record]:
    found = records.read_probe(folder)
    if not found:
        raise UserError(f"{folder}: expected probe records, found none")
    for record in found:
        several = len(record.get("reward_scale") or ()) > 1
        if not record.get("reward_scale") or record.get("proxy_by" if several else "proxy") is None:
            raise UserError(
                f"{folder}: the probe at step {record['step']} does not say what the rewards are worth; expected a run"
                " of PPO without model.proxy"
            )
        if record.get("gold") is None:
            raise UserError(f"{folder}: the probe at step {record['step']} has no gold; expected a gold scorer")
    return found


def _named(place: str) -> tuple[str, str]:
    name, equals, folder = place.partition("=")
    return (name, folder) if equals and not Path(place).exists() else ("", place)


def _model(folder: str, name: str) -> Any:
    """Return what the run's config says of a reward; None without a config or without its rewards."""
    import yaml

    path = Path(folder) / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rewards = config.get("model", {}).get("init_args", {}).get("rewards") or {}
    return rewards.get(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m studies.proxy_points", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("how", choices=["individual", "joint"])
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="individual: or NAME=RUN_FOLDER")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("thresholds.yaml"), help="file to write (%(default)s)"
    )
    parser.add_argument("--units", choices=["standardised", "raw"], default="standardised", help="(%(default)s)")
    parser.add_argument("--constraint", choices=KINDS, default="Equal", help="(%(default)s)")
    parser.add_argument("--surface", choices=["process", "polynomial"], default="process", help="joint (%(default)s)")
    parser.add_argument("--degree", type=int, default=10, help="of the polynomial, at most (%(default)s)")
    parser.add_argument("--pessimism", type=float, default=1.0, help="of the process, in deviations (%(default)s)")
    parser.add_argument("--dense", type=float, default=0.1, help="share of the probes cut off as rim (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
