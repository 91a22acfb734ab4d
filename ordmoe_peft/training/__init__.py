"""The trainer: TRL's `SFTTrainer` with one more loss."""

from .arguments import OrdMoETrainingArguments
from .router_health import RouterHealth
from .trainer import OrdMoETrainer


__all__ = ["OrdMoETrainer", "OrdMoETrainingArguments", "RouterHealth"]
