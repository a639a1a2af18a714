"""One self-contained HTML file, or a table on the terminal, from any number of run folders; without torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_rlhf import records, report_constraints, report_reward
from lit_rlhf.errors import UserError
from lit_rlhf.functional.curves import RESAMPLES, Curve, Estimate, Law, Outcome, curve_of, law_of, outcome, place
from lit_rlhf.functional.overoptimization import Interval
from lit_rlhf.records import Record
from lit_rlhf.report_parts import environment, padded

SAMPLES_SHOWN = 6
CURVES_SHOWN = 24
POINTS_SHOWN = 400
HUGE = 9999
_UNITS = {
    "loss": "loss", "loss/preference": "loss", "loss/sft": "beta x eta x nats", "rewards/chosen": "beta x nats",
    "rewards/rejected": "beta x nats", "rewards/margins": "beta x nats", "rewards/accuracies": "share of pairs",
    "logps/chosen": "nats per response", "logps/rejected": "nats per response", "reward/accuracy": "share of pairs",
    "reward/margin": "score", "reward/mean": "score", "reward/std": "score", "ensemble/std": "standard deviations",
    "objective/kl": "nats per response", "objective/entropy": "nats per response", "objective/scores": "score",
    "objective/rlhf_reward": "score", "policy/clipfrac": "share of tokens", "policy/approxkl": "nats per token",
    "perf/tokens_per_second": "tokens per second", "perf/samples_per_second": "examples per second",
}  # fmt: skip
_ELSEWHERE = ("gold", "probe", "hp_metric", "epoch", "data")  # families of tags that the report shows in other ways


@dataclass(frozen=True)
class Run:
    """A run folder that a probe has written to.

    Args:
        folder: where it is.
        records: its probe records by rising step, at least one.
    """

    folder: Path
    records: list[Record]

    @cached_property
    def samples(self) -> list[Record]:
        """Its sampled responses."""
        return records.read_samples(self.folder)

    @property
    def seed(self) -> int | None:
        """The seed that it ran with, if it said so."""
        return self.records[-1].get("seed")

    @property
    def config(self) -> str:
        """The text of its `config.yaml`, empty without one."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone.

    Args:
        label: name for people, different for each method of a report.
        runs: one for each seed, at least one.
        replaced: folders of runs that are left out, since a later one has the same seed.
    """

    label: str
    runs: list[Run]
    replaced: list[Path] = field(default_factory=list)

    @cached_property
    def curve(self) -> Curve:
        """Gold and proxy against sqrt(KL)."""
        return curve_of(self.label, [run.records for run in self.runs])

    @cached_property
    def law(self) -> Law | None:
        """The law fitted to gold, with intervals."""
        return law_of([run.records for run in self.runs], [run.samples for run in self.runs])

    @cached_property
    def outcome(self) -> Outcome:
        """A row of the table of methods."""
        return outcome(self.label, [run.records for run in self.runs], [run.samples for run in self.runs])


def main(argv: Sequence[str]) -> None:
    """Write a report of run folders and print its table.

    Raises:
        UserError: a folder holds neither probe nor reward records.
    """
    parser = argparse.ArgumentParser(prog="train.py report", description="Run folders to one self-contained HTML file.")
    parser.add_argument(
        "folders", nargs="+", metavar="RUN_FOLDER", help="holds a probe.jsonl or a reward.jsonl, or folders that do"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file to write (%(default)s)")
    parser.add_argument("--title", default="Over-optimisation report", help="headline of the report")
    options = parser.parse_args(argv)
    methods, rewards = load(options.folders), report_reward.load(options.folders)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(html(methods, options.title, rewards), encoding="utf-8", errors="replace")
    for folder in (folder for method in methods for folder in method.replaced):
        print(f"left out, since a later run has its label, configuration and seed: {folder}")
    if methods:
        print(_text([method.outcome for method in methods]))
    if rewards:
        print(("\n" if methods else "") + report_reward.table_text(rewards))
    print(f"\nreport: {options.output}")


def table_text(folders: Sequence[str | Path]) -> str:
    """Return the table of methods as plain text, from the same folders that `main` takes.

    Raises:
        UserError: a folder holds neither probe nor reward records.
    """
    return _text([method.outcome for method in load(folders)])


def load(folders: Sequence[str | Path]) -> list[Method]:
    """Read runs and put seeds of one method together: those with the same label and configuration hash.

    A folder without records stands for all run folders under it. Of two runs with one seed the later one counts.

    Raises:
        UserError: a folder does not exist, or neither it nor one under it holds probe or reward records.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    replaced: dict[tuple[str, str], list[Path]] = {}
    for folder in folders:
        _holds_records(Path(folder))
    for folder in (file.parent for file in records.files(folders, records.PROBE)):
        run = Run(folder, records.read_probe(folder))
        if not run.records:
            raise UserError(f"{folder / records.PROBE}: expected at least one probe record, found none")
        last = run.records[-1]
        label = str(last.get("label") or last.get("method") or folder.name)
        key = (label, str(last.get("config_hash")))
        group = groups.setdefault(key, [])
        same = [other for other in group if run.seed is not None and other.seed == run.seed]
        replaced.setdefault(key, []).extend(other.folder for other in same)
        group[:] = [other for other in group if other not in same] + [run]
    labels = [label for label, _ in groups]
    return [
        Method(label if labels.count(label) == 1 else f"{label} ({digest[:6]})", runs, replaced[label, digest])
        for (label, digest), runs in groups.items()
    ]


def html(methods: Sequence[Method], title: str, rewards: Sequence[report_reward.RewardRuns] = ()) -> str:
    """Render the report; everything that a model or a user wrote is escaped by the template."""
    from markupsafe import Markup

    from lit_rlhf import plots

    templates = environment()
    templates.globals |= {"estimate": _estimate, "drop": _drop, "within": _within, "series": len(plots.SERIES)}
    curves = [method.curve for method in methods]
    drawn = [c for c in curves if c.gold is not None or c.proxy is not None]
    # best-of-n's KL is a bound, and other methods spend KL in another way: each kind has axes of its own
    kinds = {"overview": [c for c in drawn if not c.bound], "best-of-n": [c for c in drawn if c.bound]}
    overviews = [
        plots.svg(plots.gold_figure(kind, size=(5.6, 5.4 if len(kind) > 1 else 4.0)), name)
        for name, kind in kinds.items()
        if kind
    ]
    each = {c.label: plots.svg(plots.gold_figure([c], size=(4.4, 3.4)), f"method {i}") for i, c in enumerate(drawn)}
    tags = _training_curves(methods)
    return templates.get_template(
        "report.html.j2"
    ).render(
        title=title,
        methods=methods,
        fitted=[(method.label, method.law) for method in methods if method.law is not None],
        resamples=RESAMPLES,
        summary=_summary([method.outcome for method in methods]),
        overviews=[Markup(svg) for svg in overviews],  # noqa: S704 - drawn here; matplotlib escapes labels
        has_bound=bool(kinds["best-of-n"]),
        each={label: Markup(svg) for label, svg in each.items()} if len(each) > 1 else {},  # noqa: S704
        has_gold=any(curve.gold is not None for curve in curves),
        has_proxy=any(curve.proxy is not None for curve in curves),
        training=[
            (tag, Markup(plots.svg(plots.scalar_figure(lines, _UNITS.get(tag.removeprefix("val/"), "value")), tag)))  # noqa: S704
            for tag, lines in tags[:CURVES_SHOWN]
        ],
        left_out=[tag for tag, _ in tags[CURVES_SHOWN:]],
        constraints=Markup(  # noqa: S704 - rendered by a template that escapes
            report_constraints.section({method.label: [run.records for run in method.runs] for method in methods})
        ),
        rewards=Markup(report_reward.section(rewards)),  # noqa: S704 - rendered by a template that escapes
        samples=[(method.label, _before_and_after(method.runs[0])) for method in methods],
    )


def _holds_records(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not any(any(folder.rglob(name)) for name in (records.PROBE, records.REWARD)):
        raise UserError(
            f"{folder}: expected a run folder with {records.PROBE}, which GoldProbe writes, or {records.REWARD}, which"
            " RewardDiagnostics writes, or folders of such"
        )


def _summary(outcomes: Sequence[Outcome]) -> str:
    """Say what stands out: the highest peak, and the largest loss after a peak."""
    peaks = [(o.peak_gold.value, o) for o in outcomes if o.peak_gold and o.peak_kl]
    drops = [(o.drop.value, o) for o in outcomes if o.drop]
    text = ""
    if peaks:
        height, best = max(peaks, key=lambda pair: pair[0])
        kl = best.peak_kl.value if best.peak_kl else 0.0
        text = f"The highest gold is {height:+.2f} sd, reached by {best.label} at {kl:.1f} nats. "
    if drops and max(drops, key=lambda pair: pair[0])[0] > 0:
        loss, worst = max(drops, key=lambda pair: pair[0])
        text += f"The largest loss after a peak is {loss:.0%} of the gain, by {worst.label}."
    return text


def _estimate(estimate: Estimate | None, style: str = ".2f") -> str:
    if estimate is None:
        return "-"
    return format(estimate.value, style) + ("" if estimate.half is None else f" ± {format(estimate.half, style)}")


def _drop(o: Outcome) -> str:
    """Say the drop, or why there is none: nothing gained is not nothing known."""
    return "no gain" if o.drop is None and o.peak_gold is not None else _estimate(o.drop, ".0%")


def _within(value: float | None, interval: Interval | None, style: str = ".2f") -> str:
    if value is None:
        return "none"
    ends = [_number(end, style) for end in interval or ()]
    return _number(value, style) + (f" [{', '.join(ends)}]" if ends else "")


def _number(value: float, style: str) -> str:
    """Show a fitted number; so far out that no data speak of it, it is only said to be large."""
    return "∞" if math.isinf(value) else f">{HUGE}" if value > HUGE else format(value, style)


def _text(outcomes: Sequence[Outcome]) -> str:
    heads = ("method", "seeds", "peak gold", "final gold", "drop", "KL at peak", "final KL", "win rate")
    lines = [heads, *map(_cells, outcomes)]
    note = "gold: standard deviations of the step-0 samples above step 0; KL: nats per response; ±: 95 % over seeds"
    return f"{padded(lines)}\n{note}"


def _cells(o: Outcome) -> tuple[str, ...]:
    others = (_estimate(value) for value in (o.peak_kl, o.final_kl, o.win_rate))
    golds = (_estimate(o.peak_gold), _estimate(o.final_gold), _drop(o))
    return (o.label, str(o.seeds), *golds, *others)


def _before_and_after(run: Run) -> list[tuple[str, Record, Record]]:
    """Prompt, first and last sample, for the first prompts of a run."""
    if not run.samples:
        return []
    first, last = place(run.samples[0]), place(run.samples[-1])
    rows = {(place(row), row["prompt_index"]): row for row in run.samples if row["sample_index"] == 0}
    prompts = sorted(index for step, index in rows if step == last and (first, index) in rows)[:SAMPLES_SHOWN]
    return [(_said(rows[last, i]["prompt"]), rows[first, i], rows[last, i]) for i in prompts]


def _said(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _training_curves(methods: Sequence[Method]) -> list[tuple[str, list[tuple[int, list[int], list[float]]]]]:
    """Logged values with two points or more: tag to (number of method, steps, values) of each run."""
    found: dict[str, list[tuple[int, list[int], list[float]]]] = {}
    for number, method in enumerate(methods):
        for run in method.runs:
            for tag, values in _scalars(run.folder).items():
                if len(values) > 1 and tag.removeprefix("val/").split("/")[0] not in _ELSEWHERE:
                    steps = sorted(values)[:: -(-len(values) // POINTS_SHOWN)]
                    found.setdefault(tag, []).append((number, steps, [values[step] for step in steps]))
    known = {tag: place for place, tag in enumerate(_UNITS)}
    return sorted(found.items(), key=lambda item: (known.get(item[0].removeprefix("val/"), len(known)), item[0]))


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Read the scalars of a folder's TensorBoard event files: tag to step to value, the last of a step winning."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.name):
        for tag, step, value in _events(path):
            found.setdefault(tag, {})[step] = value
    return found


def _events(path: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value
