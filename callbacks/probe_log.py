"""How a probe shows itself: TensorBoard tags, a figure, a table of samples, and a line on the console."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from callbacks.probe_rows import Row
from lit_rlhf.functional.curves import Curve
from lit_rlhf.functional.overoptimization import ScalingLaw, proxy_gap
from lit_rlhf.records import Record
from lit_rlhf.types import Prompt


def show(
    loggers: Sequence[Logger], record: Record, rows: Sequence[Row], curve: Curve, metrics: Mapping[str, float]
) -> None:  # fmt: skip
    """Send numbers to every logger, figure and table to TensorBoard, and one line to the console."""
    from lit_rlhf import plots  # drawing takes a second to import

    step = record["step"]
    for logger in loggers:
        logger.log_metrics(dict(metrics), step=step)
        if isinstance(logger, TensorBoardLogger):
            picture = plots.pixels(plots.gold_figure([curve]))
            logger.experiment.add_image("probe/gold_and_proxy", picture, step, dataformats="HWC")
            logger.experiment.add_text("probe/samples", _table(rows), step)
    print(("\r\x1b[2K" if sys.stdout.isatty() else "") + _line(record), flush=True)  # over a progress bar


def scalars(record: Record, fit: ScalingLaw | None) -> dict[str, float | None]:
    """Return the TensorBoard tags of one record; the gap needs proxy and gold, the fitted peak must lie in the data."""
    kl = record["kl_k1"]
    return {
        "gold/score": record["gold"],
        "gold/proxy_gap": proxy_gap(record["proxy_z"], record["gold_z"]),
        "gold/win_rate": record["win_rate"],
        "probe/kl_k1": kl,
        "probe/kl_k3": record["kl_k3"],
        "probe/sqrt_kl": None if kl is None else math.sqrt(max(kl, 0.0)),
        "gold/peak_kl_fit": None if fit is None or fit.extrapolated else fit.peak_kl,
    }


def _line(record: Record) -> str:
    shown = {"kl": "kl_k1", "proxy": "proxy", "gold": "gold", "win rate": "win_rate"}
    values = [f"{name} {round(record[key], 3) + 0.0:.3f}" for name, key in shown.items() if record[key] is not None]
    return f"probe at step {record['step']}: " + ", ".join(values)


def _table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of samples; code spans and entities keep model text from being read as markup."""
    lines = ["| prompt | response | KL | proxy | gold |", "|---|---|---|---|---|"]
    for row in rows:
        scores = (f"{row[name]:.3f}" if row[name] is not None else "" for name in ("kl_k1", "proxy", "gold"))
        lines.append("| " + " | ".join([_cell(row["prompt"]), _cell(row["response"]), *scores]) + " |")
    return "\n".join(lines)


def _cell(text: Prompt) -> str:
    flat = " ".join((text if isinstance(text, str) else "\n".join(m["content"] for m in text)).split())
    return re.sub(r"[^\w\s.,;:!?'-]", lambda found: f"&#{ord(found.group())};", flat)
