"""lit_rlhf: reward models and policies from preferences, watched for over-optimisation while they train."""

__version__ = "0.1.0"
