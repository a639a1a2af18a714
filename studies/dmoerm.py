"""What `dmoerm.smk` needs besides commands: labels as pairs, accuracies, and `python -m studies.dmoerm table FILE...`.

An aspect label becomes a pair of its own ("all labels"), so that a single reward model can learn from everything that
DMoERM sees. Accuracy is the share of clean test pairs whose better response scores higher. The table shows means over
seeds with 95 % t-intervals, and differences to DMoERM within a seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_rlhf.functional.curves import interval
from lit_rlhf.types import Scorer

Row = dict[str, Any]


def labels(source: str, out: str) -> None:
    """Write every pair, and after it one more for each of its aspect labels."""
    with Path(out).open("w", encoding="utf-8") as file:
        for row in read(source):
            pair = {key: row[key] for key in ("prompt", "chosen", "rejected", "category")}
            turned = pair | {"chosen": row["rejected"], "rejected": row["chosen"]}
            values = (1, *filter(None, row["aspects"].values()))
            file.writelines(json.dumps(pair if value > 0 else turned) + "\n" for value in values)


def accuracy(test: str, out: str, seed_folder: str) -> None:
    """Write the accuracy of every trained model, and of DMoERM's variants that need no training of their own."""
    rows = read(test)
    found = {name: right_share(scorer, rows) for name, scorer in scorers(Path(seed_folder)).items()}
    Path(out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def scorers(folder: Path) -> dict[str, Scorer]:
    """Return the models of a seed by name."""
    from lit_rlhf.models.moe_scorer import MoERewardModel
    from lit_rlhf.models.reward import load

    found = {done.stem: load(str(done.with_suffix("") / "version_0" / "hf")) for done in sorted(folder.glob("*.done"))}
    whole = str(folder / "dmoerm" / "version_0" / "hf")
    found |= {f"{routing}_routing": MoERewardModel(whole, routing=routing) for routing in ("soft", "oracle")}
    for name, inner in {"mean_for_mlp": "mean", "no_inner": "none"}.items():
        variant = MoERewardModel(whole)
        variant.description["inner"] = inner
        found[name] = variant
    return found


def right_share(scorer: Scorer, rows: Sequence[Row]) -> float:
    """Return the share of pairs that a model gets right; equal scores count half."""
    prompts, categories = [row["prompt"] for row in rows], [row["category"] for row in rows]
    chosen, rejected = (
        scorer.score(prompts, [r[side] for r in rows], categories).total for side in ("chosen", "rejected")
    )
    return float(((chosen > rejected).double() + (chosen == rejected).double() / 2).mean())


def table(*files: str) -> None:
    """Print accuracy by model over the seeds that have it, and its difference to DMoERM's in the same seeds."""
    seeds = [json.loads(Path(file).read_text()) for file in files]
    print("| model | seeds | accuracy | less DMoERM |\n|---|---|---|---|")
    found = {name: [seed for seed in seeds if name in seed] for name in {name for seed in seeds for name in seed}}
    for name, own in sorted(found.items(), key=lambda item: -fmean(seed[item[0]] for seed in item[1])):
        accuracy, less = [seed[name] for seed in own], [seed[name] - seed["dmoerm"] for seed in own]
        print(f"| {name} | {len(own)} | {shown(accuracy, '')} | {shown(less, '+')} |")


def shown(values: Sequence[float], sign: str) -> str:
    """Return mean and half-width; a single seed has no interval."""
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")


def read(path: str) -> list[Row]:
    """Read JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"labels": labels, "accuracy": accuracy, "table": table}
    commands[sys.argv[1]](*sys.argv[2:])
