"""Statistics of scored pairs: from columns, one entry for each pair, to the numbers of a reward model's record.

Legend: N pairs, M policy samples. Columns are NumPy in float64; correlations and AUROC are torchmetrics' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_rlhf.errors import UserError
from lit_rlhf.functional.calibration import (
    NORMAL,
    agreement,
    brier,
    expected_calibration_error,
    macro_average,
    proportion,
    reliability,
)
from lit_rlhf.functional.probe_stats import clustered_mean, standardised

Floats = NDArray[np.float64]
UNNAMED = "(no category)"


@dataclass(frozen=True)
class Pairs:
    """N scored pairs.

    Args:
        chosen: [N], score of the response called better.
        rejected: [N], score of the other.
        label: [N], probability that `chosen` is the better one.
        chosen_length: [N], in tokens or characters.
        rejected_length: [N], in the same unit.
        prompts: [N], integers; pairs of one prompt share theirs.
        categories: N names or None.
        gates: expert's name to [N], the weight that an expert had for a pair; empty without experts.
        logits: [N], of the model's probability that `chosen` is the better one; None where the scores are raw, so that
            it is the margin. On standardised or aggregated scores the margin is no logit.
    """

    chosen: Floats
    rejected: Floats
    label: Floats
    chosen_length: Floats
    rejected_length: Floats
    prompts: NDArray[np.int64]
    categories: Sequence[str | None]
    gates: Mapping[str, Floats] = field(default_factory=dict)
    logits: Floats | None = None

    @property
    def margin(self) -> Floats:
        """[N], chosen less rejected."""
        return self.chosen - self.rejected

    @property
    def scores(self) -> Floats:
        """[2N], chosen first."""
        return np.concatenate([self.chosen, self.rejected])

    @property
    def lengths(self) -> Floats:
        """[2N], chosen first."""
        return np.concatenate([self.chosen_length, self.rejected_length])


def summarise(pairs: Pairs, *, bins: int = 10) -> dict[str, Any]:
    """Boil N pairs down to the statistics of a reward model's record, plain data.

    Accuracies count agreement with the majority label; a pair of label exactly 1/2 is not graded. Calibration takes the
    label as it is, against sigmoid(logit).

    Args:
        pairs: N >= 1 pairs with finite scores.
        bins: of the reliability curve and, as quantiles, of the length curve.

    Returns:
        `accuracy`, `length_accuracy` (of a rule that prefers the longer response) and `macro` (mean over categories;
        None with fewer than two) as shares with intervals; `ties`; `ece`, `brier`, `reliability`; `length` (see
        `against_length`); `categories`, name to `accuracy`, `length_accuracy` and `brier`, those that have a graded
        pair; `experts` (see `usage`).

    Raises:
        UserError: all labels are 1/2.
    """
    margin, longer = pairs.margin, pairs.chosen_length - pairs.rejected_length
    sided, better = pairs.label != 0.5, pairs.label > 0.5
    if not sided.any():
        raise UserError(f"all {len(sided)} pairs have label 0.5; expected one at least whose better response is known")
    right, rule = agreement(margin, better), agreement(longer, better)
    logits = margin if pairs.logits is None else pairs.logits
    squared = brier(logits, pairs.label)
    curve = reliability(logits, pairs.label, pairs.prompts, bins)
    everywhere = _places(pairs.categories)
    places = {name: at & sided for name, at in everywhere.items() if (at & sided).any()}
    groups = {name: proportion(right[at], pairs.prompts[at]) for name, at in places.items()}
    return {
        "accuracy": asdict(proportion(right[sided], pairs.prompts[sided])),
        "length_accuracy": asdict(proportion(rule[sided], pairs.prompts[sided])),
        "macro": asdict(macro_average(list(groups.values()))) if len(groups) > 1 else None,
        "ties": int((margin == 0).sum()),
        "margin": float(margin.mean()),
        "ece": expected_calibration_error(curve),
        "brier": float(squared.mean()),
        "reliability": [asdict(each) for each in curve],
        "length": against_length(pairs, bins=bins),
        "categories": {
            name: {
                "accuracy": asdict(groups[name]),
                "length_accuracy": asdict(proportion(rule[at], pairs.prompts[at])),
                "brier": float(squared[everywhere[name]].mean()),
            }
            for name, at in places.items()
        },
        "experts": usage(pairs.gates, everywhere),
    }


def against_length(pairs: Pairs, *, bins: int = 10) -> dict[str, Any]:
    """Say how the score of a response moves with its length.

    Returns:
        `pearson` and `spearman` over all 2N responses, `slope` of the least-squares line (score for one more token or
        character), `prefers_longer`, the share of pairs of unequal length whose longer response scores higher (ties
        half), each None where undefined, and `curve`: mean `length`, mean `score` and the `half` width of its 95 %
        interval, clustered by prompt, for each of `bins` quantiles of length.
    """
    x, y, prompts = pairs.lengths, pairs.scores, np.concatenate([pairs.prompts, pairs.prompts])
    pearson, spearman = _correlations(x, y)
    margin, longer = pairs.margin, pairs.chosen_length - pairs.rejected_length
    sided = longer != 0
    edges = np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, x, side="left")
    curve = []
    for b in np.unique(place):
        mean, error = clustered_mean(y[place == b], prompts[place == b])
        half = None if error is None else NORMAL * error
        curve.append({"length": float(x[place == b].mean()), "score": mean, "half": half})
    follows = agreement(margin[sided], (longer[sided] > 0).astype(float))
    return {
        "pearson": pearson,
        "spearman": spearman,
        "slope": None if pearson is None else pearson * float(y.std() / x.std()),
        "prefers_longer": asdict(proportion(follows, pairs.prompts[sided])) if sided.any() else None,
        "curve": curve,
    }


def shift(data: ArrayLike, data_prompts: ArrayLike, policy: ArrayLike, policy_prompts: ArrayLike) -> dict[str, Any]:
    """Say how far the scores of a policy's samples lie from those of the data's responses.

    shift = (mean(policy) - mean(data)) / sd(data)
    auroc = P(a sample scores above a response of the data), ties half; Mann and Whitney's U over its maximum

    The interval of the shift takes both means, with errors clustered by prompt, as independent and the spread of the
    data as known; where samples and data answer the same prompts it is too wide rather than too narrow.

    Args:
        data: [N] scores.
        data_prompts: [N], integers.
        policy: [M] scores.
        policy_prompts: [M], integers.

    Returns:
        `shift`, `low`, `high` (None where undefined), `auroc`, `samples`, `prompts`.
    """
    from torch import as_tensor
    from torchmetrics.functional.classification import binary_auroc

    a, b = np.asarray(data, np.float64), np.asarray(policy, np.float64)
    (_, error), (_, error_b) = clustered_mean(a, data_prompts), clustered_mean(b, policy_prompts)
    value = standardised(b, a)
    half = None
    if value is not None and error is not None and error_b is not None:
        half = NORMAL * float(np.hypot(error, error_b) / a.std(ddof=1))
    # torchmetrics takes what lies outside [0, 1] for logits: ranks say the same as scores
    levels, rank = np.unique(np.concatenate([a, b]), return_inverse=True)
    target = np.repeat([0, 1], [len(a), len(b)])
    return {
        "shift": value,
        "low": None if value is None or half is None else value - half,
        "high": None if value is None or half is None else value + half,
        "auroc": float(binary_auroc(as_tensor(rank / len(levels)), as_tensor(target))),
        "samples": len(b),
        "prompts": len(np.unique(np.asarray(policy_prompts))),
    }


def usage(gates: Mapping[str, Floats], places: Mapping[str, NDArray[np.bool_]]) -> dict[str, dict[str, float]]:
    """Sum the experts' weights over the pairs of each category: counts where a router picks one expert a prompt.

    Args:
        gates: expert's name to [N].
        places: category to [N], True on its pairs; empty where there are no categories.
    """
    if not gates:
        return {}
    everything = {UNNAMED: np.ones(len(next(iter(gates.values()))), dtype=bool)}
    where = dict(places) or everything
    return {category: {name: float(g[at].sum()) for name, g in gates.items()} for category, at in where.items()}


def _places(categories: Sequence[str | None]) -> dict[str, NDArray[np.bool_]]:
    """Category to the pairs that are in it, by name; empty where no pair has a category."""
    if all(name is None for name in categories):
        return {}
    names = np.array([UNNAMED if name is None else name for name in categories], dtype=object)
    return {name: names == name for name in sorted(set(names))}


def _correlations(x: Floats, y: Floats) -> tuple[float | None, float | None]:
    from torch import as_tensor
    from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return None, None
    left, right = (as_tensor((values - values.mean()) / values.std()) for values in (x, y))
    return float(pearson_corrcoef(left, right)), float(spearman_corrcoef(left, right))
