"""What the benchmarks share of training: one batch again and again, timed, and its memory noted."""

import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from ordmoe_peft import OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.tools.plan.settings import PlanSettings

from .measuring import peak_of


class MeasuringTrainer(OrdMoETrainer):
    """Notes the peak of each training step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = []
        peak = peak_of(lambda: losses.append(super(MeasuringTrainer, self).training_step(*args, **kwargs)))
        self.peaks = [*getattr(self, "peaks", ()), peak]
        return losses[0]


class Clock(TrainerCallback):
    """The seconds of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def trainer_on(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    settings: PlanSettings,
    folder: str,
    cls: type[OrdMoETrainer] = OrdMoETrainer,
    **changes: Any,
) -> OrdMoETrainer:
    """A trainer as `settings` say, for which every batch is this one.

    Args:
        changes: of its arguments; by default one step of two micro-batches, so that gradients exist in the second.
    """
    arguments = {
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "tier_passes": settings.tier_passes,
        "log_tiers_every": 0,
        "max_length": None,
        "bf16": True,
        "use_cpu": settings.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    } | changes
    rows = arguments["max_steps"] * arguments["gradient_accumulation_steps"] * settings.batch_size
    return cls(
        model,
        args=OrdMoETrainingArguments(folder, **arguments),
        train_dataset=Dataset.from_dict({"input_ids": [[1]] * 2 * rows}),
        data_collator=lambda rows: dict(batch),
        processing_class=tokenizer(),
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that is never asked to tokenise."""
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
