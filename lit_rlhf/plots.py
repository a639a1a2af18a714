"""Figures of gold, proxy and training, drawn without pyplot; the same figure serves TensorBoard and the report.

The report's SVG takes its colours from CSS variables, so that it follows dark mode; `PAINT` says which is which.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lit_rlhf.functional.curves import Band, Curve

# Okabe and Ito's colours where they stand out on white, darker kin where they do not; told apart by marker as well
SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#8a6a00", "#5b5b6b")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID = "#1b1b1f", "#d4d4dc"
PAINT = {INK: "var(--ink)", GRID: "var(--rule)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)}}
_STYLE = {
    "axes.edgecolor": GRID, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK, "xtick.color": GRID,
    "ytick.color": GRID, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "grid.linewidth": 0.6,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
    "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 9, "lines.markersize": 4.5,
    "lines.linewidth": 1.6, "svg.fonttype": "none", "text.parse_math": False, "figure.constrained_layout.use": True,
}  # fmt: skip
_X = "√KL to the reference (√nats per response)"
_X_BOUND = "√KL (analytic bound) of best-of-n (√nats per response)"
_Y = "score (sd at step 0)"


@contextmanager
def styled() -> Iterator[None]:
    """Draw and render in the project's style, and without warnings about letters that the drawing font lacks."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def gold_figure(curves: Sequence[Curve], *, size: tuple[float, float] = (6.4, 4.4)) -> Figure:
    """Draw gold and proxy against sqrt(KL): one method on one pair of axes, several with gold above and proxy below.

    Bands are 95 % intervals, and the dotted line is the fitted law. A star marks its peak; a hollow star marks the
    highest measured point where the law has no peak inside the data.
    """
    with styled():
        figure = Figure(figsize=size)
        if len(curves) == 1:
            axes = gold_axes = proxy_axes = figure.add_subplot()
        else:
            gold_axes, proxy_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
            gold_axes.set_title("gold", loc="left")
            proxy_axes.set_title("proxy", loc="left")
            axes = proxy_axes
        for i, curve in enumerate(curves):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            if curve.gold is not None:
                name = f" {_short(curve.label)}" if len(curves) > 1 else " gold"
                _line(gold_axes, curve.sqrt_kl, curve.gold, color=colour, marker=marker, label=name)
                _law(gold_axes, curve, colour)
            if curve.proxy is not None:
                name, shown = (" proxy", SERIES[1]) if len(curves) == 1 else (f" {_short(curve.label)}", colour)
                _line(proxy_axes, curve.sqrt_kl, curve.proxy, color=shown, marker=marker, label=name, linestyle="--")
        for each in {gold_axes, proxy_axes}:
            each.set_ylabel(_Y)
        axes.set_xlabel(_X_BOUND if curves and all(curve.bound for curve in curves) else _X)
        axes.set_xlim(left=0)
        figure.align_ylabels()
        _legend(figure, (gold_axes, proxy_axes), len(curves))
    return figure


def scalar_figure(lines: Sequence[tuple[int, Sequence[float], Sequence[float]]], unit: str) -> Figure:
    """Draw one logged value against optimizer steps.

    Args:
        lines: for each run the number of its method, its steps and its values.
        unit: of the value, for the axis.
    """
    with styled():
        figure = Figure(figsize=(3.6, 2.3))
        axes = figure.add_subplot()
        for method, steps, values in lines:
            axes.plot(steps, values, color=SERIES[method % len(SERIES)], linewidth=1.3, alpha=0.85)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Render to an `<svg>` element that scales, takes its colours from CSS, and shares no id with another `name`.

    Args:
        figure: made by this module.
        name: what the picture shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    with styled(), mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # the page has one style sheet, and no metadata
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    prefix = "f" + sha256(name.encode()).hexdigest()[:8]
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', rf'<svg \1role="img" aria-label="{escape(name)}"', text, count=1)
    for colour, variable in PAINT.items():
        text = text.replace(colour, variable)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render to an image, [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with styled():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]


def _line(axes: Axes, x: NDArray[np.float64], band: Band, **style: object) -> None:
    axes.plot(x, band.middle, **style)  # type: ignore[arg-type]
    # a band follows the order of x, while the line follows time
    order = np.argsort(x)
    axes.fill_between(x[order], band.low[order], band.high[order], color=style["color"], alpha=0.15, linewidth=0)


def _law(axes: Axes, curve: Curve, colour: str) -> None:
    assert curve.gold is not None
    start, end = float(curve.gold.middle[0]), float(curve.sqrt_kl.max())
    fit = curve.fit
    if fit is not None:
        d = np.linspace(end / 200, end, 200)
        axes.plot(d, start + fit.predict(d**2), color=colour, linestyle=":", linewidth=1.2)
        if fit.peak_kl is not None and fit.peak_gold is not None and not fit.extrapolated:
            at, high = fit.peak_kl**0.5, start + fit.peak_gold
            axes.plot([at], [high], marker="*", markersize=13, color=colour, linestyle="none")
            return
    if np.isfinite(curve.gold.middle).any() and len(curve.steps) > 1:
        best = int(np.nanargmax(curve.gold.middle))
        x, y = [curve.sqrt_kl[best]], [curve.gold.middle[best]]
        axes.plot(x, y, marker="*", markersize=13, color=colour, markerfacecolor="none", linestyle="none")


def _legend(figure: Figure, axes: tuple[Axes, Axes], methods: int) -> None:
    known: dict[str, Artist] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    if known:
        columns = 2 if methods == 1 else min(3, len(known))
        figure.legend(known.values(), known.keys(), loc="outside upper left", ncols=columns)


def _short(label: str) -> str:
    return label if len(label) <= 26 else label[:25] + "…"
