"""From the scores of best-of-n's samples to curves: who picks, what it is worth for every n, and how sure that is.

Legend: P prompts, N samples, K members, G values of n. Each label becomes a folder of records that `report` reads.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lit_rlhf import records
from lit_rlhf.bon_store import Progress, lasting
from lit_rlhf.errors import UserError
from lit_rlhf.functional.aggregation import RewardAggregator
from lit_rlhf.functional.best_of_n import Ranking, empirical_kl, kl_bound, prompt_intervals, win_shares
from lit_rlhf.functional.probe_stats import clustered_mean, finite, standardised
from lit_rlhf.report_parts import padded
from lit_rlhf.specs import plain

Floats = NDArray[np.float64]
Standardise = Literal["overall", "prompt", "raw"]
CURVES, SUMMARY = "curves", "summary.json"
_EMPTY = (
    "update", "examples_seen", "epoch", "kl_k1", "kl_k1_se", "kl_k2", "kl_k2_se", "kl_k3", "kl_k3_se",
    "implicit_reward", "implicit_margin", "implicit_accuracy", "constraints",
)  # fmt: skip


@dataclass(frozen=True)
class Selector:
    """How the best of n responses is picked.

    Args:
        reward: name of the reward model.
        by: "total", its one number; an aggregator of its members' scores, standardised as the run says; or
            "each_member", every member alone, their curves then averaged: what a single one of them is worth.
    """

    reward: str
    by: Literal["total", "each_member"] | RewardAggregator = "total"


@dataclass(frozen=True)
class Columns:
    """A scorer's numbers for all samples.

    Args:
        total: [P, N].
        members: [P, N, K], where an ensemble made the total.
        parts: name to [P, N].
    """

    total: Floats
    members: Floats | None = None
    parts: Mapping[str, Floats] = field(default_factory=dict)


class Samples(Protocol):
    """What the curves need of the samples themselves."""

    prompts: Any

    def numbers(self, name: str) -> Floats:
        """Return a number of every sample, [P, N]."""
        ...

    def texts(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """Return responses by prompt and sample number."""
        ...


def check_selectors(selectors: Mapping[str, Selector], rewards: Iterable[str]) -> None:
    """Refuse what could not be picked by, or not be written down.

    Raises:
        UserError: an unknown reward, or a label that is no name.
    """
    known = list(rewards)
    for label, selector in selectors.items():
        if selector.reward not in known:
            raise UserError(f"selectors.{label}.reward: {selector.reward!r} is unknown; expected {', '.join(known)}")
        if not re.fullmatch(r"[\w .,=+-]+", label):
            raise UserError(f"selectors: {label!r} names a folder; expected letters, digits, space and `_ . , = + -`")


def standardise(members: Floats, how: Standardise, name: str) -> Floats:
    """Bring the members' scores [P, N, K] to one scale; see the command's `standardise`.

    Raises:
        UserError: a member gives all samples one score, which leaves nothing to scale.
    """
    if how == "raw":
        return members
    centre = members.mean(1 if how == "prompt" else (0, 1), keepdims=True)
    spread = (members - centre).std((0, 1), ddof=1) if members[..., 0].size > 1 else np.zeros(members.shape[2])
    for k in np.flatnonzero(~(spread > 1e-12)):
        raise UserError(f"rewards.{name}: member {k} gives all samples one score; take it out, or standardise: raw")
    return np.asarray((members - centre) / spread)


def rankings(selector: Selector, scores: Columns, how: Standardise) -> tuple[list[Floats], Floats | None]:
    """Return what responses are picked by, one or several [P, N], and the members' scores behind it, [P, N, K]."""
    members = None if scores.members is None else standardise(scores.members, how, selector.reward)
    if selector.by == "total":
        return [scores.total], scores.members
    assert members is not None, "tried before the samples were drawn"
    if selector.by == "each_member":
        return list(np.moveaxis(members, -1, 0)), members
    flat = torch.from_numpy(members.reshape(-1, members.shape[-1]))
    return [selector.by(flat).numpy().reshape(members.shape[:2])], members


class Grid:
    """Expectations over n of everything that is known of the samples, for one selector.

    Args:
        proxies: what responses are picked by, each [P, N]; several are averaged at the end.
        ns: [G].
    """

    def __init__(self, proxies: list[Floats], ns: list[int]) -> None:
        self.proxies, self.ns = proxies, ns
        self._ranked = [Ranking.of(proxy) for proxy in proxies]

    def expect(self, values: Floats) -> Floats:
        """Return [G, P] of values [P, N]."""
        return np.asarray(np.mean([ranking.expect(values, self.ns) for ranking in self._ranked], axis=0))

    def proxy(self) -> Floats:
        """Return what each proxy scores itself, [G, P]."""
        own = (r.expect(p, self.ns) for r, p in zip(self._ranked, self.proxies, strict=True))
        return np.asarray(np.mean(list(own), axis=0))

    def proxy_z(self) -> list[float | None]:
        """Return the same above the mean of all samples, in their standard deviations, [G]."""
        found: list[list[float | None]] = []
        for ranking, proxy in zip(self._ranked, self.proxies, strict=True):
            found.append([standardised(row, proxy.ravel()) for row in ranking.expect(proxy, self.ns)])
        known = ([z for z in column if z is not None] for column in zip(*found, strict=True))
        return [float(np.mean(column)) if len(column) == len(found) else None for column in known]

    def kl(self) -> Floats:
        """Return the KL to the samples' own distribution, [G, P]."""
        return np.asarray(np.mean([empirical_kl(proxy, self.ns) for proxy in self.proxies], axis=0))

    def picked(self, n: int) -> NDArray[np.intp]:
        """Return the best of the first n samples by the first proxy, [P], as an example of what is picked."""
        return self.proxies[0][:, :n].argmax(1)


def write_curves(
    folder: Path,
    settings: Mapping[str, Any],
    selectors: Mapping[str, Selector],
    scores: Mapping[str, Columns],
    gold: Columns | None,
    samples: Samples,
) -> None:  # fmt: skip
    """Write records and examples of every selector under `curves/`, a summary, and print what came out."""
    shutil.rmtree(folder / CURVES, ignore_errors=True)
    golds: dict[str, Floats] = {}
    with Progress("curves", len(selectors)) as progress:
        for number, (label, selector) in enumerate(selectors.items()):
            started = perf_counter()
            proxies, members = rankings(selector, scores[selector.reward], settings["standardise"])
            grid = Grid(proxies, settings["ns"])
            rows = list(_records(grid, members, gold, samples, settings["seed"]))
            about = _about(label, selector, settings, samples) | {"seconds": round(perf_counter() - started, 3)}
            place = folder / CURVES / f"{number:02}-{label}"
            records.append(place / records.PROBE, [finite(about | row) for row in rows])
            records.append(place / records.SAMPLES, _examples(grid, gold, samples))
            shutil.copy(folder / "config.yaml", place / "config.yaml")
            if gold is not None:
                golds[label] = grid.expect(gold.total)
            progress.add(1)
        summary = _summary(folder, golds, settings, gold)
        (folder / SUMMARY).write_text(json.dumps(finite(summary), indent=2) + "\n", encoding="utf-8")
    _show(folder, summary)


def _about(label: str, selector: Selector, settings: Mapping[str, Any], samples: Samples) -> dict[str, Any]:
    names = ("policy", "prompts", "split", "n_samples", "ns", "sampling", "standardise")
    hashed = {name: settings[name] for name in names} | {"n_prompts": len(samples.prompts), "by": plain(selector.by)}
    # where reward models lie is left out, since each seed may have its own; gold is one for all seeds, so that counts
    hashed |= {"reward": lasting(settings["rewards"][selector.reward]), "gold": json.dumps(lasting(settings["gold"]))}
    name = ", ".join(filter(None, (settings["label"], "best-of-n", label)))
    return {
        "method": "bon", "label": name, "seed": settings["seed"],
        "config_hash": records.config_hash(hashed), **dict.fromkeys(_EMPTY),
        "n_prompts": len(samples.prompts), "n_samples": len(samples.prompts) * settings["n_samples"],
        "sampling": settings["sampling"],
    }  # fmt: skip


def _records(
    grid: Grid, members: Floats | None, gold: Columns | None, samples: Samples, seed: int
) -> Iterator[dict[str, Any]]:
    """Make a record of every n."""
    curves: dict[str, Floats] = {"proxy": grid.proxy(), "kl_empirical": grid.kl()}
    plain_means = {"length": grid.expect(samples.numbers("length")), "eos_rate": grid.expect(samples.numbers("ended"))}
    if members is not None:
        each = np.stack([grid.expect(members[..., k]) for k in range(members.shape[-1])], -1).mean(1)
        plain_means["proxy_std"] = grid.expect(members.std(-1))
    parts: dict[str, Floats] = {}
    if gold is not None:
        curves |= {"gold": grid.expect(gold.total), "win_rate": grid.expect(win_shares(gold.total))}
        parts = {name: grid.expect(values).mean(1) for name, values in gold.parts.items()}
    rng = np.random.default_rng(seed)
    ends = {name: prompt_intervals(curve, rng=rng) for name, curve in curves.items()}
    proxy_z, prompts = grid.proxy_z(), np.arange(len(curves["proxy"][0]))
    for g, n in enumerate(grid.ns):
        row: dict[str, Any] = {"n": n, "kl_bound": kl_bound(n), "proxy_z": proxy_z[g]}
        row |= dict.fromkeys(("gold", "gold_se", "gold_z", "gold_interval", "win_rate", "win_rate_se", "gold_by"))
        for name, curve in curves.items():
            row[name], row[f"{name}_se"] = clustered_mean(curve[g], prompts)
            row[f"{name}_gain_se"] = clustered_mean(curve[g] - curve[0], prompts)[1]
            row[f"{name}_interval"] = ends[name][g].tolist()
        row |= {"proxy_members": None, "proxy_std": None}
        row |= {name: float(curve[g].mean()) for name, curve in plain_means.items()}
        if members is not None:
            row["proxy_members"] = each[g].tolist()
        if gold is not None:
            row["gold_z"] = standardised(curves["gold"][g], gold.total.ravel())
            row["gold_by"] = {name: float(values[g]) for name, values in parts.items()} or None
        yield row


def _examples(grid: Grid, gold: Columns | None, samples: Samples) -> Iterator[dict[str, Any]]:
    """For every n and prompt: the best of the first n samples, and the prompt's expectation over all subsets."""
    picked = [grid.picked(n) for n in grid.ns]
    texts = samples.texts((p, int(s)) for row in picked for p, s in enumerate(row))
    lengths, ended, proxy = samples.numbers("length"), samples.numbers("ended"), grid.proxy()
    believed = None if gold is None else grid.expect(gold.total)
    for g, n in enumerate(grid.ns):
        for p, s in enumerate(picked[g].tolist()):
            line = samples.prompts[p]
            yield {
                "n": n, "prompt_index": p, "sample_index": 0, "picked": s, "prompt": line.prompt,
                "category": line.category, "response": texts[p, s],
                "gold": None if gold is None else float(gold.total[p, s]),
                "gold_expected": None if believed is None else float(believed[g, p]),
                "proxy": float(grid.proxies[0][p, s]), "proxy_expected": float(proxy[g, p]),
                "length": int(lengths[p, s]), "ended": bool(ended[p, s]),
            }  # fmt: skip


def _summary(
    folder: Path, golds: Mapping[str, Floats], settings: Mapping[str, Any], gold: Columns | None
) -> dict[str, Any]:
    """Fit, drop and distance to the first label, with intervals over the prompts they all share."""
    from lit_rlhf import report

    found: dict[str, Any] = {"ns": settings["ns"], "kl_bound": [kl_bound(n) for n in settings["ns"]], "labels": {}}
    spread = gold.total.std(ddof=1) if gold is not None and gold.total.size > 1 else 0.0
    if not spread > 0:
        return found
    for (label, curve), method in zip(golds.items(), report.load([folder / CURVES]), strict=True):
        first, rng = next(iter(golds.values())), np.random.default_rng(settings["seed"])
        gain, above = (curve - curve[0]) / spread, (curve - first) / spread
        law = None if method.law is None else vars(method.law.fit)
        drop = method.outcome.drop
        found["labels"][label] = {
            "gain": gain.mean(1).tolist(), "gain_interval": prompt_intervals(gain, rng=rng).tolist(),
            "above_first": above.mean(1).tolist(), "above_first_interval": prompt_intervals(above, rng=rng).tolist(),
            "law": law, "drop": None if drop is None else drop.value,
        }  # fmt: skip
    return found


def _show(folder: Path, summary: Mapping[str, Any]) -> None:
    """Print gold over n for every label, then the report's table."""
    from lit_rlhf import report

    if summary["labels"]:
        print("\ngain in gold, standard deviations of all samples, with 95 % intervals over prompts")
        heads = ["n", "KL (analytic bound)", *summary["labels"]]
        lines = [heads]
        for g, n in enumerate(summary["ns"]):
            cells = [_cell(of["gain"][g], of["gain_interval"][g]) for of in summary["labels"].values()]
            lines.append([str(n), f"{summary['kl_bound'][g]:.2f}", *cells])
        print(padded(lines, left=0, ruled=False))
    print(f"\n{report.table_text([folder])}\n\nreport: python train.py report {folder}", flush=True)


def _cell(value: float, ends: list[float]) -> str:
    return f"{value:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]"
