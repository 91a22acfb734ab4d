"""Samples of a data set as model inputs: prompts to answer, or prompts with their answers to score.

Samples are in TRL's prompt-completion format, conversational or plain, with an optional `images` or `image` column.
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..errors import OrdMoEDataError


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


def check_prompt_completion(columns: list[str]) -> None:
    """Raise [`OrdMoEDataError`] unless there are prompts and answers to compare with."""
    missing = [name for name in ("prompt", "completion") if name not in columns]
    if missing:
        raise OrdMoEDataError(
            f"The data set has no column {' and no column '.join(map(repr, missing))}, which evaluation needs; it has "
            f"{sorted(columns)}. Use TRL's prompt-completion format."
        )


def sample_images(sample: dict[str, Any]) -> list:
    """The images of a sample, none where it has no such column."""
    return [sample["image"]] if "image" in sample else list(sample.get("images") or [])


def answer_text(sample: dict[str, Any]) -> str:
    """The reference answer as plain text, without the chat template around it."""
    completion = sample["completion"]
    content = completion if isinstance(completion, str) else completion[-1]["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    return content.strip()


def prompt_inputs(samples: list[dict[str, Any]], processing_class: ProcessingClass) -> dict[str, torch.Tensor]:
    """Left-padded inputs for `generate`, rendered as TRL renders prompts for training."""
    texts, images = [], []
    for sample in samples:
        prompt = sample["prompt"]
        images.append(sample_images(sample))
        if not isinstance(prompt, str):
            messages = prepare_multimodal_messages(prompt, images=images[-1]) if images[-1] else prompt
            prompt = processing_class.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        texts.append(prompt)
    visual = {"images": images} if any(images) else {}
    return processing_class(
        text=texts, **visual, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )


def scoring_inputs(samples: list[dict[str, Any]], processing_class: ProcessingClass) -> dict[str, torch.Tensor]:
    """Inputs and `labels` (−100 outside the answer) as the trainer's collator makes them."""
    collate = DataCollatorForVisionLanguageModeling(processing_class, completion_only_loss=True)
    rows = []
    for sample in samples:
        images = sample_images(sample)
        row = {name: sample[name] for name in ("prompt", "completion")}
        if not images and is_conversational(row):
            # Text-only templates may not read the list form of messages that the collator makes for images.
            row = apply_chat_template(row, processing_class)
        rows.append({**row, "images": images})
    return collate(rows)
