"""The trainer: TRL's `SFTTrainer` with one more loss."""

from .arguments import OrdMoETrainingArguments
from .trainer import OrdMoETrainer


__all__ = ["OrdMoETrainer", "OrdMoETrainingArguments"]
