"""Conductors: one LightningModule per way of training."""

from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_search import ThresholdSearchModule
from lit_rlhf.modules.preference import PreferenceModule
from lit_rlhf.modules.reward import RewardModule
from lit_rlhf.modules.reward_ensemble import RewardEnsembleModule
from lit_rlhf.modules.reward_moe import RewardMoEModule
from lit_rlhf.modules.router import RouterModule
from lit_rlhf.modules.sft import SFTModule

__all__ = [
    "PPOModule",
    "PreferenceModule",
    "RewardEnsembleModule",
    "RewardMoEModule",
    "RewardModule",
    "RouterModule",
    "SFTModule",
    "ThresholdSearchModule",
]
