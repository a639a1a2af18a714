"""What the rewards were worth before training: the units of thresholds and logs, and where each stream set out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional.sequence import masked_moments
from lit_rlhf.modules.multipliers import Kept
from lit_rlhf.modules.reduce import summed
from lit_rlhf.types import UserError

FLOOR = 1e-6  # a spread below it is rounding noise


class RewardScale(Kept):
    """Mean and spread of each reward on the reference policy's samples, as buffers that carry the reward's name.

    Args:
        names: of the rewards.
        units: "standardised": (score - mean) / std; "raw": the scores as they are.
    """

    def __init__(self, names: Sequence[str], units: Literal["standardised", "raw"]) -> None:
        super().__init__()
        self.samples: Tensor
        self.names, self.units = list(names), units
        for name in names:
            self.register_buffer(f"{name}/mean", torch.tensor(0.0))
            self.register_buffer(f"{name}/std", torch.tensor(1.0))
        self.register_buffer("samples", torch.tensor(0))

    @property
    def measured(self) -> bool:
        """Whether `measure` was called, in this run or in the one that it goes on from."""
        return bool(self.samples > 0)

    @torch.no_grad()
    def measure(self, scores: Mapping[str, Tensor]) -> None:
        """Keep mean and population spread of scores, name to [B], over all processes.

        Raises:
            UserError: a reward gives all samples one score, so that it has no unit.
        """
        for name in self.names:
            moments = masked_moments(scores[name], torch.ones_like(scores[name], dtype=torch.bool))
            count, total, squares = summed(torch.stack(moments)).unbind()
            mean = total / count
            std = (squares / count - mean.square()).clamp_min(0).sqrt()
            if self.units == "standardised" and not std > FLOOR * max(1.0, abs(float(mean))):
                raise UserError(
                    f"reward {name!r} scores all {int(count)} samples of the reference policy alike"
                    f" ({float(mean):g}), so it cannot be standardised; expected another reward, or units: raw"
                )
            self.get_buffer(f"{name}/mean").copy_(mean)
            self.get_buffer(f"{name}/std").copy_(std)
        self.samples.fill_(int(count.item()))

    def to_units(self, name: str, score: Tensor) -> Tensor:
        """Return scores in the run's units."""
        if self.units == "raw":
            return score
        return (score - self.get_buffer(f"{name}/mean")) / self.get_buffer(f"{name}/std")

    def start(self, name: str) -> float:
        """Return a reward's mean at step 0 in the run's units, from which tolerances are measured."""
        return 0.0 if self.units == "standardised" else float(self.get_buffer(f"{name}/mean"))

    def report(self) -> dict[str, dict[str, float]]:
        """Return the raw mean and spread of each reward on the reference policy's samples by name."""
        return {name: {k: float(self.get_buffer(f"{name}/{k}")) for k in ("mean", "std")} for name in self.names}
