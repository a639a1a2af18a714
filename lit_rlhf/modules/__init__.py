"""Conductors: one LightningModule per way of training."""

from lit_rlhf.modules.preference import PreferenceModule
from lit_rlhf.modules.reward import RewardModule
from lit_rlhf.modules.sft import SFTModule

__all__ = ["PreferenceModule", "RewardModule", "SFTModule"]
