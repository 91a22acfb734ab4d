"""Samples of a data set as model inputs: prompts to answer, or prompts with their answers to score.

Samples are in TRL's prompt-completion format, conversational or plain, with an optional `images` or `image` column.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..errors import OrdMoEConfigError, OrdMoEDataError, OrdMoEModelError
from .texts import check_texts, first_row


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


def check_samples(dataset: Any, group_by: str | None = None) -> None:
    """Raise [`OrdMoEDataError`] unless rows have prompts, answers to compare with, and the column to group by."""
    columns = dataset.column_names
    missing = [name for name in ("prompt", "completion") if name not in columns]
    if missing:
        raise OrdMoEDataError(
            f"The data set has no column {' and no column '.join(map(repr, missing))}, which evaluation needs; it has "
            f"{sorted(columns)}. Use TRL's prompt-completion format."
        )
    if group_by is not None and group_by not in columns:
        raise OrdMoEDataError(f"group_by={group_by!r} is not a column; there are {sorted(columns)}.")
    first_row(dataset, "evaluation")
    check_texts(dataset, ["prompt", "completion"], "evaluation")


def check_processing_class(processing_class: Any, source: str) -> None:
    """Raise [`OrdMoEModelError`] unless this is a tokenizer that knows words, or a processor that has one.

    Without the files of one, transformers gives an empty tokenizer of the model's class, or a processor of images.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.get_vocab().keys() <= {
        *tokenizer.all_special_tokens
    }:
        raise OrdMoEModelError(
            f"{source} has no tokenizer, only {type(processing_class).__name__} without a vocabulary. Save the "
            "tokenizer or processor of the model beside it."
        )


def check_counts(**counts: int | None) -> None:
    """Raise [`OrdMoEConfigError`] unless each count that is given is at least 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise OrdMoEConfigError(f"{name} must be at least 1, got {count}.")


def subsample(dataset: Any, limit: int | None, seed: int = 0) -> Any:
    """At most `limit` samples, drawn by `seed`; all of them, in their order, without."""
    if limit is None:
        return dataset
    check_counts(limit=limit)
    return dataset.shuffle(seed=seed).select(range(min(limit, len(dataset))))


def sample_batches(dataset: Any, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """The samples of `dataset` in order, `batch_size` at a time."""
    for start in range(0, len(dataset), batch_size):
        yield [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]


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
        if isinstance(prompt, str):
            prompt = prompt if images[-1] else _beginning(processing_class) + prompt
        else:
            messages = prepare_multimodal_messages(prompt, images=images[-1]) if images[-1] else prompt
            prompt = processing_class.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        texts.append(prompt)
    visual = {"images": images} if any(images) else {}
    return processing_class(
        text=texts, **visual, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )


def _beginning(processing_class: ProcessingClass) -> str:
    """The token that the tokenizer itself puts before a text, as the trainer lets it do with plain text."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""


def _whole_text(row: dict[str, str], processing_class: ProcessingClass) -> dict[str, str]:
    """Plain text with the tokens around it that the trainer adds; a chat template has its own."""
    end = getattr(processing_class, "tokenizer", processing_class).eos_token
    completion = row["completion"]
    return {
        "prompt": _beginning(processing_class) + row["prompt"],
        "completion": completion if completion.endswith(end) else completion + end,
    }


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
        elif not images:
            row = _whole_text(row, processing_class)
        rows.append({**row, "images": images})
    return collate(rows)
