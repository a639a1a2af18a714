"""Losses on preference pairs: Bradley-Terry for reward models, and direct alignment of policies.

Legend: B pairs. Log-probabilities are nats summed over response tokens, the end token included; every loss is [B].
To add one: a class here, and a row in the table of `tests/functional/test_preference.py`.

Notation: h_w, h_l are the log-ratios logp(policy) - logp(reference) of the chosen and the rejected response.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.errors import UserError
from lit_rlhf.functional.sequence import widen
from lit_rlhf.types import LossOutput, PairLogps


@dataclass(frozen=True)
class LogRatios:
    """Log-ratios of B pairs, which is all that a direct alignment loss sees.

    Args:
        chosen: [B], nats, h_w.
        rejected: [B], nats, h_l.
        chosen_length: [B], response tokens.
        rejected_length: [B], response tokens.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def margin(self) -> Tensor:
        """[B], nats, h_w - h_l."""
        return self.chosen - self.rejected

    @property
    def mean_margin(self) -> Tensor:
        """[B], nats a token, h_w / |y_w| - h_l / |y_l|."""
        return _per_token(self.chosen, self.chosen_length) - _per_token(self.rejected, self.rejected_length)

    @property
    def length_gap(self) -> Tensor:
        """[B], tokens, |y_w| - |y_l|."""
        return (self.chosen_length - self.rejected_length).to(self.chosen.dtype)

    def swapped(self) -> LogRatios:
        """Return the pairs with the other response called chosen."""
        return LogRatios(self.rejected, self.chosen, self.rejected_length, self.chosen_length)


class PreferenceLoss(ABC):
    """A loss on preference pairs for a policy with a reference; children are frozen dataclasses.

    Attributes:
        beta: strength of the pull to the reference; implicit rewards are beta times the summed log-ratio.
    """

    beta: float

    @abstractmethod
    def __call__(self, policy: PairLogps, reference: PairLogps, label: Tensor | None = None) -> LossOutput:
        """Return the loss of every pair.

        Args:
            policy: [B] each; gradients flow through its log-probabilities alone.
            reference: [B] each; the same responses under the frozen reference.
            label: [B], probability that the chosen response is the better one; 1 when left out. A soft label mixes the
                loss of the pair and that of the swapped pair: label * loss + (1 - label) * swapped loss.

        Returns:
            loss [B], and metrics [B]: `rewards/chosen`, `rewards/rejected` and `rewards/margins` (beta times summed
            log-ratios for every loss), `rewards/accuracies` (ties half), `logps/chosen`, `logps/rejected` (policy),
            `loss/preference` and `loss/sft` (they add up to the loss). Rewards and accuracies are those of the pair as
            given, whatever the label.
        """


class LogRatioLoss(PreferenceLoss):
    """A preference loss that is a function of the pair's log-ratios; children state only `pair_loss`."""

    @abstractmethod
    def pair_loss(self, ratios: LogRatios) -> Tensor:
        """Return the loss [B] of pairs whose chosen response is the better one."""

    def __call__(self, policy: PairLogps, reference: PairLogps, label: Tensor | None = None) -> LossOutput:
        """Return the loss of every pair; see `PreferenceLoss`."""
        ratios = LogRatios(
            widen(policy.chosen) - widen(reference.chosen).detach(),
            widen(policy.rejected) - widen(reference.rejected).detach(),
            policy.chosen_length,
            policy.rejected_length,
        )
        loss = self.pair_loss(ratios)
        if label is not None:
            loss = _mixed(label, loss, self.pair_loss(ratios.swapped()))
        metrics = {
            "rewards/chosen": self.beta * ratios.chosen,
            "rewards/rejected": self.beta * ratios.rejected,
            "rewards/margins": self.beta * ratios.margin,
            "rewards/accuracies": _wins(ratios.margin),
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "loss/preference": loss,
            "loss/sft": torch.zeros_like(loss),
        }
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


@dataclass(frozen=True)
class DPO(LogRatioLoss):
    """Direct preference optimisation, with conservative label smoothing.

    loss = -(1 - e) log sigmoid(u) - e log sigmoid(-u),   u = beta * (h_w - h_l),   e = label_smoothing

    Rafailov et al. 2023, arXiv:2305.18290 v3, eq. 7; the smoothing is conservative DPO (E. Mitchell, A note on DPO with
    noisy preferences, 2023), not robust DPO, which divides by 1 - 2e.

    Args:
        beta: per nat; > 0.
        label_smoothing: assumed share of flipped labels; in [0, 0.5).
    """

    beta: float
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        _require_beta(self)
        _require(0 <= self.label_smoothing < 0.5, self, "label_smoothing", "in [0, 0.5)")

    def pair_loss(self, ratios: LogRatios) -> Tensor:
        """Return the smoothed logistic loss, [B]."""
        u = self.beta * ratios.margin
        return -(1 - self.label_smoothing) * logsigmoid(u) - self.label_smoothing * logsigmoid(-u)


@dataclass(frozen=True)
class IPO(LogRatioLoss):
    """Identity preference optimisation in its two conventions, which disagree about beta.

    standard: loss = (m - 1 / (2 beta))^2     target m = 1 / (2 beta); Azar et al. 2023, arXiv:2310.12036, eq. 17
    daa:      loss = (beta * m - 1)^2         target m = 1 / beta; Rafailov et al. 2024, arXiv:2406.02900

    where m = h_w - h_l, or with length_average the difference of log-ratios per token, as TRL has it. Standard with
    beta b is 1 / (2 b)^2 times daa with beta 2b.

    Args:
        beta: per nat (per nat a token with length_average); > 0.
        convention: which of the two.
        length_average: divide each log-ratio by its response's length; the metrics stay summed.
    """

    beta: float
    convention: Literal["standard", "daa"] = "standard"
    length_average: bool = False

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        _require_beta(self)
        _require(self.convention in ("standard", "daa"), self, "convention", "'standard' or 'daa'")

    def pair_loss(self, ratios: LogRatios) -> Tensor:
        """Return the squared distance to the target margin, [B]."""
        margin = ratios.mean_margin if self.length_average else ratios.margin
        distance = margin - 1 / (2 * self.beta) if self.convention == "standard" else self.beta * margin - 1
        return distance.square()


@dataclass(frozen=True)
class SLiC(LogRatioLoss):
    """Hinge loss on the margin against the reference.

    loss = max(0, 1 - beta * (h_w - h_l))

    The form of Rafailov et al. 2024, arXiv:2406.02900. Zhao et al. 2023 (arXiv:2305.10425) have no
    reference in the hinge and add a likelihood term; wrap this in `RPO` for one.

    Args:
        beta: per nat; > 0.
    """

    beta: float

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        _require_beta(self)

    def pair_loss(self, ratios: LogRatios) -> Tensor:
        """Return the hinge, [B]."""
        return (1 - self.beta * ratios.margin).relu()


@dataclass(frozen=True)
class RDPO(LogRatioLoss):
    """DPO with a length penalty (R-DPO).

    loss = -log sigmoid(beta * (h_w - h_l) + alpha * (|y_w| - |y_l|))

    Park et al. 2024, arXiv:2403.19159. A reward of r - alpha |y| puts plus alpha |y| into the implicit reward: a longer
    chosen response already explains part of the preference, and the policy need not.

    Args:
        beta: per nat; > 0.
        alpha: per token; >= 0; 0 is exactly DPO.
    """

    beta: float
    alpha: float

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range."""
        _require_beta(self)
        _require(0 <= self.alpha < math.inf, self, "alpha", ">= 0 and finite")

    def pair_loss(self, ratios: LogRatios) -> Tensor:
        """Return the logistic loss of the shifted margin, [B]."""
        return -logsigmoid(self.beta * ratios.margin + self.alpha * ratios.length_gap)


@dataclass(frozen=True)
class RPO(PreferenceLoss):
    """Regularised preference optimisation: a preference loss with a likelihood anchor on the chosen response.

    loss = base - eta * base.beta * logp_w

    where logp_w is the policy's log-probability of the chosen response: the sum over its tokens, or their mean.
    Liu et al. 2024, arXiv:2405.16436 (base DPO, "sum"). Against DPO's push the anchor wins where
    beta * (h_w - h_l) > log((1 - eta) / eta).

    Departures: any base. Other methods called RPO exist (reward-aware, iterative reasoning), and TRL's `sft` term has
    no beta. Under soft labels the anchor stays on the chosen response.

    Args:
        base: the loss to anchor; not itself an RPO.
        eta: weight of the anchor relative to beta; >= 0; 0 is exactly `base`. 0.005 in the paper.
        reduction: over the chosen response's tokens. The authors use both; results differ.
    """

    base: PreferenceLoss
    eta: float
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Raise UserError naming the field and its range; warn over a length-averaging base."""
        _require(0 <= self.eta < math.inf, self, "eta", ">= 0 and finite")
        _require(self.reduction in ("sum", "mean"), self, "reduction", "'sum' or 'mean'")
        anchorless = isinstance(self.base, PreferenceLoss) and not isinstance(self.base, RPO)
        _require(anchorless, self, "base", "a PreferenceLoss without an anchor of its own")
        if getattr(self.base, "length_average", False):
            warnings.warn(
                f"RPO over {self.base}: its margin is per token, so beta, and with it the anchor's weight eta * beta "
                f"(reduction {self.reduction!r}), means something else than in the paper",
                stacklevel=3,
            )

    @property
    def beta(self) -> float:  # type: ignore[override]  # read-only, like every field of a frozen child
        """The base loss's beta."""
        return self.base.beta

    def __call__(self, policy: PairLogps, reference: PairLogps, label: Tensor | None = None) -> LossOutput:
        """Return base loss plus anchor for every pair; see `PreferenceLoss`."""
        output = self.base(policy, reference, label)
        logps = widen(policy.chosen)
        anchored = logps if self.reduction == "sum" else _per_token(logps, policy.chosen_length)
        sft = -self.eta * self.beta * anchored
        return LossOutput(output.loss + sft, output.metrics | {"loss/sft": sft.detach()})


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    centering: float = 0.0,
    l2: float = 0.0,
    *,
    label: Tensor | None = None,
) -> LossOutput:
    """Bradley-Terry loss of a reward model's scores.

    loss = -log sigmoid(c - r - margin) + centering * (c + r)^2 + l2 * (c^2 + r^2) / 2

    Sources: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin is Llama 2's (arXiv:2307.09288, eq. 2), the
    centring Eisenstein et al.'s (arXiv:2312.09244), the l2 term that of the models of arXiv:2310.02743 (0.001 there).

    Args:
        chosen: [B], scores, c.
        rejected: [B], scores, r.
        margin: [B], score units, by how much the better response should lead; the same for the swapped pair.
        centering: per squared score unit; >= 0.
        l2: per squared score unit; >= 0.
        label: [B], probability that the chosen response is the better one; 1 when left out. Mixes the losses of the
            pair and of the swapped pair, as in `PreferenceLoss`.

    Returns:
        loss [B], and metrics [B]: `reward/accuracy` (ties half), `reward/margin` (c - r), `reward/mean` of the two, and
        `loss/preference`, the loss without centring and l2.
    """
    _require_weight("centering", centering)
    _require_weight("l2", l2)
    chosen, rejected = widen(chosen), widen(rejected)
    lead = torch.zeros_like(chosen) if margin is None else margin
    loss = -logsigmoid(chosen - rejected - lead)
    if label is not None:
        loss = _mixed(label, loss, -logsigmoid(rejected - chosen - lead))
    metrics = {
        "reward/accuracy": _wins(chosen - rejected),
        "reward/margin": chosen - rejected,
        "reward/mean": (chosen + rejected) / 2,
        "loss/preference": loss,
    }
    total = loss + centering * (chosen + rejected).square() + l2 * (chosen.square() + rejected.square()) / 2
    return LossOutput(total, {name: value.detach() for name, value in metrics.items()})


def _mixed(label: Tensor, loss: Tensor, swapped: Tensor) -> Tensor:
    return label * loss + (1 - label) * swapped


def _wins(margin: Tensor) -> Tensor:
    """1 where positive, 0 where negative, half on a tie."""
    return (margin.sign() + 1) / 2


def _per_token(total: Tensor, length: Tensor) -> Tensor:
    # a response cut down to no token at all has log-ratio 0, and its mean is 0 too
    return total / length.clamp_min(1)


def _require(ok: bool, loss: PreferenceLoss, field: str, expected: str) -> None:
    if not ok:
        raise UserError(f"{type(loss).__name__}: {field} must be {expected}, got {getattr(loss, field)!r}")


def _require_beta(loss: PreferenceLoss) -> None:
    _require(0 < loss.beta < math.inf, loss, "beta", "> 0 and finite")


def _require_weight(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name} must be >= 0 and finite, got {value!r}")
