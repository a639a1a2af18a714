"""Prints what the seeds of a study say about each claim: `python -m studies.claims RUN_FOLDER...`.

Every number is a mean over seeds with its 95 % t-interval. "From peak to end" starts at the probe of highest gold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lit_rlhf.functional.curves import interval
from lit_rlhf.report import Method, Run, load, table_text

Measure = Callable[[Run], float]


def peak_to_end(key: str) -> Measure:
    """Return how much a record's number moved from the probe with the highest gold to the last."""

    def measure(run: Run) -> float:
        highest = max(run.records, key=lambda record: float(record["gold"]))
        return float(run.records[-1][key]) - float(highest[key])

    return measure


def at_end(key: str) -> Measure:
    """Return a record's number at the last probe."""
    return lambda run: float(run.records[-1][key])


MEASURES: dict[str, Measure] = {
    "proxy, start to end (score)": lambda run: at_end("proxy")(run) - float(run.records[0]["proxy"]),
    "proxy, from peak to end (score)": peak_to_end("proxy"),
    "implicit margin, from peak to end (beta x nats)": peak_to_end("implicit_margin"),
    "gold, from peak to end (score)": peak_to_end("gold"),
    "gold at the end, less start (score)": lambda run: at_end("gold")(run) - float(run.records[0]["gold"]),
    "chosen log-prob on held-out pairs at the end (nats)": lambda run: final_scalar(run, "val/logps/chosen"),
}


def final_scalar(run: Run, tag: str) -> float:
    """Return the last value of a TensorBoard tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder))
    events.Reload()
    return float(events.Scalars(tag)[-1].value)


def lines(method: Method) -> list[str]:
    """Return one line a measure."""
    found = [f"{method.label}, {len(method.runs)} seeds"]
    for name, measure in MEASURES.items():
        mean, half = interval([measure(run) for run in method.runs])
        found.append(f"  {name}: {mean:+.3f}" + ("" if half is None else f" ± {half:.3f}"))
    return found


def main(folders: Sequence[str]) -> None:
    """Print the table of methods and the lines of each."""
    print(table_text(folders))
    for method in load(folders):
        print("\n".join(lines(method)))


if __name__ == "__main__":
    main(sys.argv[1:])
