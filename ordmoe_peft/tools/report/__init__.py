"""Reports that people look at: one self-contained HTML page each, its figures beside it as PNG."""

from .ablation import ablate_report
from .drawing import require_matplotlib
from .health import inspect_report
from .quality import tiers_report
from .training import train_report


__all__ = ["ablate_report", "inspect_report", "require_matplotlib", "tiers_report", "train_report"]
