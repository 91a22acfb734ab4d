"""OrdMoE as a PEFT method: preference training of 4-bit Mixture-of-Experts models from their own routing.

Importing the package registers the method with peft and transformers. The trainer is imported on first use, so that
loading an adapter needs neither trl nor datasets.
"""

from typing import Any

from . import registration
from .config import OrdMoEConfig
from .errors import OrdMoEError
from .model import OrdMoEModel
from .quantization.config import MoeBitsAndBytesConfig
from .targets import coverage_report
from .tiers.routing import tier_routing


__version__ = "0.1.0.dev0"

__all__ = [
    "MoeBitsAndBytesConfig",
    "OrdMoEConfig",
    "OrdMoEError",
    "OrdMoEModel",
    "OrdMoETrainer",
    "OrdMoETrainingArguments",
    "coverage_report",
    "tier_routing",
]

registration.register()


def __getattr__(name: str) -> Any:
    if name in ("OrdMoETrainer", "OrdMoETrainingArguments"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
