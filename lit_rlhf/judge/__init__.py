"""Capability labels by an LLM judge behind an OpenAI-compatible URL."""

from lit_rlhf.judge.labels import label_aspects as label_aspects
from lit_rlhf.judge.options import JudgeOptions as JudgeOptions
from lit_rlhf.judge.tally import table as table
