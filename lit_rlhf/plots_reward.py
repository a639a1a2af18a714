"""Figures of reward models: reliability, score against length, accuracy by category; made from a record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_rlhf.plots import INK, MARKERS, SERIES, styled

BARS_SHOWN = 20


def reliability_figure(record: Mapping[str, Any]) -> Figure:
    """Draw how often the preferred response is the better one against how sure the model was; the diagonal is ideal."""
    with styled():
        figure, axes = _axes("model's probability", "share right")
        axes.plot([0.5, 1], [0.5, 1], color=INK, linestyle=":", linewidth=1)
        bins = record["reliability"]
        right = [b["accuracy"] for b in bins]
        _points(axes, [b["confidence"] for b in bins], right, 0)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.4, *(r["low"] for r in right)) - 0.02, 1.02)
    return figure


def length_figure(record: Mapping[str, Any]) -> Figure:
    """Draw the mean score of responses of like length, with its 95 % band."""
    with styled():
        figure, axes = _axes(f"response length ({record.get('length_unit', 'tokens')})", "score")
        curve = record["length"]["curve"]
        x, y = [point["length"] for point in curve], [point["score"] for point in curve]
        half = [point["half"] or 0.0 for point in curve]
        axes.plot(x, y, color=SERIES[0], marker=MARKERS[0])
        low, high = ([a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=SERIES[0], alpha=0.15, linewidth=0)
    return figure


def category_figure(record: Mapping[str, Any]) -> Figure:
    """Draw the accuracy in each category as a bar with its 95 % interval, and the length rule's as a mark.

    The largest categories are drawn, at most twenty.
    """
    found = sorted(record["categories"].items(), key=lambda item: -item[1]["accuracy"]["n"])[:BARS_SHOWN]
    found = sorted(found, reverse=True)  # the axis counts from below
    with styled():
        figure, axes = _axes("share right", "", height=1.0 + 0.28 * len(found))
        places = list(range(len(found)))
        shares = [entry["accuracy"] for _, entry in found]
        axes.barh(places, [s["value"] for s in shares], color=SERIES[0], alpha=0.35, height=0.7)
        middle = [s["value"] for s in shares]
        axes.errorbar(
            middle, places, xerr=_errors(shares), color=SERIES[0], linestyle="none", linewidth=1.3, label="model"
        )
        rule = [entry["length_accuracy"]["value"] for _, entry in found]
        axes.plot(rule, places, color=SERIES[1], marker=MARKERS[1], linestyle="none", label="longer is better")
        axes.axvline(0.5, color=INK, linestyle=":", linewidth=1)
        axes.set_yticks(places, [name if len(name) <= 18 else name[:17] + "…" for name, _ in found])
        axes.set_xlim(0, 1)
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def _axes(x: str, y: str, height: float = 2.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.6, height))
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _points(axes: Axes, x: list[float], shares: list[Mapping[str, Any]], series: int) -> None:
    y = [share["value"] for share in shares]
    axes.errorbar(x, y, yerr=_errors(shares), color=SERIES[series], marker=MARKERS[series], linewidth=1.2)


def _errors(shares: list[Mapping[str, Any]]) -> list[list[float]]:
    """How far each interval reaches below and above its share."""
    return [[s["value"] - s["low"] for s in shares], [s["high"] - s["value"] for s in shares]]
