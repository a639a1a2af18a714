"""Observers of a run: each watches training, writes what it saw, and changes nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.gold_probe import GoldProbe
    from callbacks.hf_export import HFExport
    from callbacks.peak_checkpoint import PeakCheckpoint
    from callbacks.reward_diagnostics import RewardDiagnostics
    from callbacks.rl_progress import RLProgress
    from callbacks.throughput import Throughput

__all__ = ["GoldProbe", "HFExport", "PeakCheckpoint", "RLProgress", "RewardDiagnostics", "Throughput"]

_HOME = {
    "GoldProbe": "callbacks.gold_probe",
    "HFExport": "callbacks.hf_export",
    "PeakCheckpoint": "callbacks.peak_checkpoint",
    "RewardDiagnostics": "callbacks.reward_diagnostics",
    "RLProgress": "callbacks.rl_progress",
    "Throughput": "callbacks.throughput",
}


def __getattr__(name: str) -> Any:
    """Import an observer when it is first asked for, so that the package itself costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
