"""Text in, typed batches out."""

from lit_rlhf.data.preference import PreferenceData
from lit_rlhf.data.prompts import PromptBatch, PromptData
from lit_rlhf.data.sft import SFTData

__all__ = ["PreferenceData", "PromptBatch", "PromptData", "SFTData"]
