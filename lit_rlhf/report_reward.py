"""The report's section on reward models, from the `reward.jsonl` of run folders; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_rlhf import records
from lit_rlhf.records import Record
from lit_rlhf.report_parts import environment, over_seeds, padded

DRAWN = 8


@dataclass(frozen=True)
class RewardRuns:
    """Runs of one reward model that differ in their seed alone, each at its last validation or test.

    Args:
        label: name for people.
        split: "validation" or "test".
        records: one for each seed, at least one.
    """

    label: str
    split: str
    records: list[Record]

    @property
    def seed(self) -> str:
        """Which of the seeds it is that figures show, for a caption; empty where it is not known."""
        seed = self.records[0].get("seed")
        return "" if seed is None else f", seed {seed}"

    def share(self, *path: str) -> str:
        """Show a share: with its interval over prompts for one seed, with that over seeds for several."""
        found = [_at(record, path) for record in self.records]
        if any(entry is None for entry in found):
            return "-"
        if len(found) == 1:
            return f"{found[0]['value']:.3f} [{found[0]['low']:.3f}, {found[0]['high']:.3f}]"
        return over_seeds([entry["value"] for entry in found])

    def number(self, *path: str, style: str = ".3f") -> str:
        """Show a number, with its interval over seeds where there are several."""
        found = [_at(record, path) for record in self.records]
        return "-" if any(value is None for value in found) else over_seeds(found, style)

    def shift(self) -> str:
        """Show how far a policy's samples lie from the data, in standard deviations."""
        policy = self.records[0]["policy"]
        if len(self.records) > 1 or policy is None or policy["shift"] is None or policy["low"] is None:
            return self.number("policy", "shift", style="+.2f")
        return f"{policy['shift']:+.2f} [{policy['low']:+.2f}, {policy['high']:+.2f}]"


def load(folders: Sequence[str | Path]) -> list[RewardRuns]:
    """Read the records in folders and under them: the last of each run and split; of runs with one seed the last."""
    groups: dict[tuple[str, str, str], dict[Any, Record]] = {}
    for file in records.files(folders, records.REWARD):
        last = {record["split"]: record for record in sorted(records.read(file), key=lambda r: int(r["step"]))}
        for split, record in last.items():
            key = (str(record["label"]), str(record.get("config_hash")), split)
            seed = record.get("seed")
            groups.setdefault(key, {})[file if seed is None else seed] = record
    names = [(label, split) for label, _, split in groups]
    return [
        RewardRuns(label if names.count((label, split)) == 1 else f"{label} ({digest[:6]})", split, list(runs.values()))
        for (label, digest, split), runs in groups.items()
    ]


def section(models: Sequence[RewardRuns]) -> str:
    """Render the section as HTML, everything that users and data wrote escaped; empty without models."""
    from markupsafe import Markup

    from lit_rlhf import plots, plots_reward

    if not models:
        return ""
    drawn = []
    for number, model in enumerate(models[:DRAWN]):
        record = model.records[0]
        figures = [
            ("Reliability", plots_reward.reliability_figure(record)),
            ("Score against length", plots_reward.length_figure(record)),
        ]
        if record["categories"]:
            figures.append(("Accuracy by category", plots_reward.category_figure(record)))
        name = f"{model.label}, {model.split}{model.seed}"
        svgs = [(title, Markup(plots.svg(figure, f"{title} of reward model {number}"))) for title, figure in figures]  # noqa: S704 - drawn here; matplotlib escapes labels
        drawn.append((name, svgs))
    return (
        environment()
        .get_template("reward.html.j2")
        .render(
            models=models,
            drawn=drawn,
            left_out=[model.label for model in models[DRAWN:]],
            categories=sorted({name for model in models for name in model.records[0]["categories"]}),
            experts=[(model, model.records[0]["experts"]) for model in models if model.records[0]["experts"]],
            shifted=any(model.records[0]["policy"] for model in models),
        )
    )


def table_text(models: Sequence[RewardRuns]) -> str:
    """Return the table of reward models as plain text."""
    lines = [("reward model", "split", "seeds", "accuracy", "longer is better", "ECE", "Brier")]
    for model in models:
        shares = (model.share("accuracy"), model.share("length_accuracy"), model.number("ece"), model.number("brier"))
        lines.append((model.label, model.split, str(len(model.records)), *shares))
    return padded(lines, left=len(lines[0]))


def _at(record: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = record
    for key in path:
        found = None if found is None else found.get(key)
    return found
