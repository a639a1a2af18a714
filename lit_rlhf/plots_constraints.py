"""The figure of constraints: values beside their thresholds, and the weights that held them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lit_rlhf.plots import MARKERS, SERIES, styled
from lit_rlhf.records import Record


def constraint_figure(constraints: Mapping[str, Sequence[Sequence[Record]]]) -> Figure:
    """Draw one method's constraints by step: above values (solid) and thresholds (dashed), below weights.

    Args:
        constraints: by name, of each seed the entries of its probes, with `step`, `value`, `threshold` and `weight`.
    """
    with styled():
        figure = Figure(figsize=(4.4, 4.2))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for number, (name, runs) in enumerate(constraints.items()):
            look = {"color": SERIES[number % len(SERIES)], "alpha": 0.85}
            for run in runs:
                steps = [entry["step"] for entry in run]
                first = {"label": f" {name}", "marker": MARKERS[number % len(MARKERS)]} if run is runs[0] else {}
                above.plot(steps, [entry["value"] for entry in run], **look, **first)
                above.plot(steps, [entry["threshold"] for entry in run], **look, linestyle="--", linewidth=1)
                below.plot(steps, [entry["weight"] for entry in run], **look)
        above.set_ylabel("value (run's units)")
        below.set_ylabel("weight")
        below.set_xlabel("optimizer step")
        figure.align_ylabels()
        above.legend()
    return figure
