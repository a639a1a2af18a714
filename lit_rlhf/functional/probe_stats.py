"""Statistics of one probe: from rows, one for each sampled response, to the numbers of a record.

Legend: N rows, P prompts (the clusters), K ensemble members. NumPy in float64; rows are plain dictionaries because they
are also the lines of `samples.jsonl`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Row = Mapping[str, Any]
Floats = NDArray[np.float64]


def clustered_mean(values: ArrayLike, clusters: ArrayLike) -> tuple[float, float | None]:
    """Mean over N values and its standard error when values of one cluster may move together.

    se^2 = P / (P - 1) * sum_p (sum_{i in p} (x_i - mean))^2 / N^2

    the cluster-robust variance of a mean with its small-sample factor (Liang and Zeger 1986); with one value for each
    cluster it is the familiar s / sqrt(N).

    Args:
        values: [N].
        clusters: [N], integers that name the cluster of each value.

    Returns:
        The mean, and the standard error or None with fewer than two clusters.
    """
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(place, weights=x - mean)
    if len(sums) < 2:
        return mean, None
    return mean, math.sqrt(len(sums) / (len(sums) - 1) * float(sums @ sums)) / len(x)


def win_rates(gold: ArrayLike, prompts: ArrayLike, base_gold: ArrayLike, base_prompts: ArrayLike) -> Floats:
    """Share of the base responses to the same prompt that each of N responses beats, ties counting half.

    Args:
        gold: [N].
        prompts: [N], prompt numbers.
        base_gold: [M].
        base_prompts: [M], prompt numbers; every number of `prompts` occurs.

    Returns:
        [N], in [0, 1].
    """
    ours, theirs = np.asarray(gold, np.float64)[:, None], np.asarray(base_gold, np.float64)[None]
    same = np.asarray(prompts)[:, None] == np.asarray(base_prompts)[None]
    won = (ours > theirs) + 0.5 * (ours == theirs)
    return np.asarray((won * same).sum(1) / same.sum(1))


def standardised(values: ArrayLike, base: ArrayLike) -> float | None:
    """Mean of `values` above that of `base`, in standard deviations (N - 1) of `base`; None where that spread is 0."""
    base = np.asarray(base, np.float64)
    spread = float(base.std(ddof=1)) if len(base) > 1 else 0.0
    # equal values leave a spread of rounding size
    if not spread > 1e-12 * max(1.0, float(np.abs(base).max(initial=0.0))):
        return None
    return float(np.asarray(values, np.float64).mean() - base.mean()) / spread


def summarise(rows: Sequence[Row], base: Sequence[Row] | None) -> dict[str, Any]:
    """Boil N rows down to the statistics of a probe record; a quantity that the rows do not have is None.

    Standard errors are clustered by prompt. `proxy_std` is the disagreement of the proxy's members: their population
    standard deviation for each response, averaged over responses.

    Args:
        rows: N rows with `prompt_index`, `kl_k1`, `kl_k2`, `kl_k3`, `proxy`, `proxy_members`, `implicit_reward`,
            `proxy_by`, `gold`, `gold_by`, `length`, `ended`.
        base: rows of the step-0 probe with `prompt_index`, `proxy` and `gold`; None where they are not known.

    Returns:
        Names of the record to numbers, lists or dictionaries; non-finite numbers become None.
    """
    prompts = [row["prompt_index"] for row in rows]
    found: dict[str, Any] = {}
    for name in ("kl_k1", "kl_k2", "kl_k3", "proxy", "gold"):
        values = _column(rows, name)
        found[name], found[f"{name}_se"] = (None, None) if values is None else clustered_mean(values, prompts)
    for name in ("proxy", "gold"):
        values, start = _column(rows, name), _column(base, name)
        found[f"{name}_z"] = None if values is None or start is None else standardised(values, start)
    members = _column(rows, "proxy_members")
    found["proxy_members"] = None if members is None else members.mean(0).tolist()
    found["proxy_std"] = None if members is None else members.std(axis=1).mean()
    implicit = _column(rows, "implicit_reward")
    found["implicit_reward"] = None if implicit is None else implicit.mean()
    for key in ("proxy_by", "gold_by"):
        parts = [row[key] or {} for row in rows]
        found[key] = {name: np.mean([p[name] for p in parts]) for name in parts[0]} or None
    found["win_rate"], found["win_rate_se"] = _win_rate(rows, base)
    found["length"] = np.mean([row["length"] for row in rows])
    found["eos_rate"] = np.mean([row["ended"] for row in rows])
    return {name: finite(value) for name, value in found.items()}


def finite(value: Any) -> Any:
    """Make numbers inside plain data Python's own, and non-finite ones None, as JSON wants them."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _column(rows: Sequence[Row] | None, name: str) -> Floats | None:
    """Stack one field of all rows, [N] or [N, K]; None where any row lacks it or holds no finite number."""
    values = [row[name] for row in rows or ()]
    if not values or any(value is None for value in values):
        return None
    column = np.array(values, dtype=np.float64)
    return column if np.isfinite(column).all() else None


def _win_rate(rows: Sequence[Row], base: Sequence[Row] | None) -> tuple[float | None, float | None]:
    gold, start = _column(rows, "gold"), _column(base, "gold")
    if base is None or gold is None or start is None:
        return None, None
    prompts = [row["prompt_index"] for row in rows]
    return clustered_mean(win_rates(gold, prompts, start, [row["prompt_index"] for row in base]), prompts)
