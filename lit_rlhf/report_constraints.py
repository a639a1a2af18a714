"""The report's section on constraints: where each stood beside its threshold, from probe records; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lit_rlhf.records import Record
from lit_rlhf.report_parts import environment, over_seeds

LATE = 4  # a share of the probes, one in so many, that a run's end is averaged over


@dataclass(frozen=True)
class Held:
    """One constraint of one method, over its seeds.

    Args:
        method: label of the method.
        name: of the constraint.
        runs: of each seed, the constraint's entry in each probe: value, threshold, multiplier and weight.
    """

    method: str
    name: str
    runs: list[list[Record]]

    def late(self, key: str) -> str:
        """Show a number, averaged over the last quarter of the probes, with its interval over seeds."""
        found = [fmean(entry[key] for entry in run[-max(1, len(run) // LATE) :]) for run in self.runs]
        return over_seeds(found, "+.2f")


def held(methods: Mapping[str, Sequence[Sequence[Record]]]) -> list[Held]:
    """Find the constraints of methods; the probes of each seed come by label."""
    found = []
    for label, runs in methods.items():
        names = [name for record in runs[0][-1:] for name in record.get("constraints") or {}]
        for name in names:
            own = [[entry for record in run if (entry := _entry(record, name))] for run in runs]
            found.append(Held(label, name, [run for run in own if run]))
    return [one for one in found if one.runs]


def section(methods: Mapping[str, Sequence[Sequence[Record]]]) -> str:
    """Render the section as HTML, everything that users wrote escaped; empty where nothing was constrained."""
    from markupsafe import Markup

    from lit_rlhf import plots, plots_constraints

    found = held(methods)
    if not found:
        return ""
    drawn = []
    for number, label in enumerate(dict.fromkeys(one.method for one in found)):
        own = {one.name: one.runs for one in found if one.method == label}
        figure = plots_constraints.constraint_figure(own)
        drawn.append((label, Markup(plots.svg(figure, f"constraints {number}"))))  # noqa: S704 - drawn here; matplotlib escapes labels
    return environment().get_template("constraints.html.j2").render(found=found, drawn=drawn)


def _entry(record: Record, name: str) -> Record | None:
    """Return a constraint's entry with its step, or None where it was not measured."""
    entry = (record.get("constraints") or {}).get(name)
    return None if entry is None or entry["value"] is None else entry | {"step": record["step"]}
