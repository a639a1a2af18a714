"""Text in, typed batches out."""

from lit_rlhf.data.categories import CategoryData
from lit_rlhf.data.phases import PhaseData
from lit_rlhf.data.preference import PreferenceData
from lit_rlhf.data.prompts import PromptBatch, PromptData
from lit_rlhf.data.sft import SFTData

__all__ = ["CategoryData", "PhaseData", "PreferenceData", "PromptBatch", "PromptData", "SFTData"]
