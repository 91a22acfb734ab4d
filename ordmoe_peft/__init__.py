"""OrdMoE as a PEFT method: preference training of 4-bit Mixture-of-Experts models from their own routing.

Importing the package registers the method with peft and transformers. What trains or writes data is imported on first
use, so that loading an adapter needs neither trl nor datasets.
"""

import importlib
from typing import Any

from . import registration
from .adapter.config import OrdMoEConfig
from .adapter.model import OrdMoEModel
from .adapter.targets import coverage_report
from .errors import OrdMoEError
from .quantization.config import MoeBitsAndBytesConfig
from .quantization.memory_by_role import quantization_census
from .quantization.quantize_model import quantize_experts_
from .tiers.routing import tier_routing


__version__ = "0.1.0.dev0"

__all__ = [
    "MoeBitsAndBytesConfig",
    "OrdMoEConfig",
    "OrdMoEError",
    "OrdMoEModel",
    "OrdMoETrainer",
    "OrdMoETrainingArguments",
    "RouterHealth",
    "coverage_report",
    "load_data",
    "quantization_census",
    "quantize_experts_",
    "rollout",
    "tier_routing",
    "to_preference_pairs",
]

# Public name → module, for those that need trl or datasets.
IMPORTED_ON_USE = {
    "OrdMoETrainer": ".training",
    "OrdMoETrainingArguments": ".training",
    "RouterHealth": ".training",
    "load_data": ".data.loading",
    "rollout": ".data.rollouts",
    "to_preference_pairs": ".data.preference_pairs",
}

registration.register()


def __getattr__(name: str) -> Any:
    if name in IMPORTED_ON_USE:
        return getattr(importlib.import_module(IMPORTED_ON_USE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
