"""What a PPO run has done so far, and what its method is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rlhf.functional.constrained import AtLeast, AtMost, Constraint, Equal
from lit_rlhf.modules.multipliers import Dual, Kept
from lit_rlhf.modules.objective import NegativeKL, Objective, Satisficing, WeightedReward


class Progress(Kept):
    """What a run has done: updates, responses learnt from, and where the KL coefficient stands."""

    def __init__(self, kl_coefficient: float) -> None:
        super().__init__()
        self.updates: Tensor
        self.examples: Tensor
        self.kl_coefficient: Tensor
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("examples", torch.tensor(0))
        self.register_buffer("kl_coefficient", torch.tensor(float(kl_coefficient)))


def method_of(objective: Objective, constraints: Sequence[Constraint], dual: Dual) -> str:
    """Name the method as its config is called, where it is one of the known ones."""
    kinds = {type(constraint) for constraint in constraints}
    if not kinds:
        return "ppo_sat" if isinstance(objective, Satisficing) else "ppo"
    if dual.form == "mixed" and isinstance(objective, NegativeKL) and kinds in ({AtLeast}, {Equal}):
        return "ppo_mu" if kinds == {AtLeast} else "ppo_xi"
    known = dual.form == "mixed" and isinstance(objective, WeightedReward) and kinds == {AtMost}
    return "ppo_all" if known else "ppo_lagrangian"
