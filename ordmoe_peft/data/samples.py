"""Samples of a data set as model inputs: prompts to answer, or prompts with their answers to score.

Samples are in TRL's prompt-completion format, conversational or plain, with an optional `images` or `image` column.
"""

import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from trl import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..errors import OrdMoEConfigError, OrdMoEDataError, OrdMoEModelError


ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
Inputs: TypeAlias = BatchEncoding | BatchFeature


def tokenizer_of(processing_class: ProcessingClass) -> Any:
    """The tokenizer itself, or a processor's."""
    return getattr(processing_class, "tokenizer", processing_class)


def check_processing_class(processing_class: Any, source: str) -> None:
    """Raise [`OrdMoEModelError`] unless this is a tokenizer that knows words, or a processor that has one.

    Without the files of one, transformers gives an empty tokenizer of the model's class, or a processor of images.
    """
    tokenizer = tokenizer_of(processing_class)
    is_tokenizer = isinstance(tokenizer, PreTrainedTokenizerBase)
    if not is_tokenizer or not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
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


def _check_takes_images(images: list[list[Any]], processing_class: ProcessingClass) -> None:
    """Raise [`OrdMoEDataError`] for images that a base of text alone is given."""
    if any(images) and not isinstance(processing_class, ProcessorMixin):
        raise OrdMoEDataError(
            f"The samples have images, and the base reads text alone ({type(processing_class).__name__}). Give a base "
            "that sees, or leave out the column of images."
        )


def _tools(sample: dict[str, Any]) -> Any:
    """The tools that a conversation may call, as TRL takes them: a list, or a list in JSON."""
    tools = sample.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def answer_text(sample: dict[str, Any]) -> str:
    """The reference answer as plain text, without the chat template around it."""
    completion = sample["completion"]
    content = completion if isinstance(completion, str) else completion[-1]["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    return content.strip()


def prompt_inputs(samples: list[dict[str, Any]], processing_class: ProcessingClass) -> Inputs:
    """Left-padded inputs for `generate`, rendered as TRL renders prompts for training."""
    processor: Any = processing_class
    texts, images = [], [sample_images(sample) for sample in samples]
    _check_takes_images(images, processing_class)
    for sample, own_images in zip(samples, images, strict=True):
        prompt = sample["prompt"]
        if not isinstance(prompt, str):
            messages = prepare_multimodal_messages(prompt, images=own_images) if own_images else prompt
            texts.append(
                processor.apply_chat_template(
                    messages, tools=_tools(sample), add_generation_prompt=True, tokenize=False
                )
            )
        else:
            texts.append(prompt if own_images else _beginning(processing_class) + prompt)
    visual = {"images": images} if any(images) else {}
    return processor(
        text=texts, **visual, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )


def scoring_inputs(samples: list[dict[str, Any]], processing_class: ProcessingClass) -> Inputs:
    """Inputs and `labels` (−100 outside the answer) as the trainer's collator makes them."""
    collate = DataCollatorForVisionLanguageModeling(processing_class, completion_only_loss=True)
    rows, images_of_rows = [], [sample_images(sample) for sample in samples]
    _check_takes_images(images_of_rows, processing_class)
    for sample, images in zip(samples, images_of_rows, strict=True):
        row = {name: sample[name] for name in ("prompt", "completion")}
        if not any(images_of_rows) and is_conversational(row):
            # Text-only templates may not read the list form of messages that the collator makes for images.
            row = apply_chat_template(row, processing_class, tools=_tools(sample))
        elif not images and not is_conversational(row):
            # Plain text has no chat template, so it gets the tokens that the trainer puts around it.
            end = tokenizer_of(processing_class).eos_token
            row["prompt"] = _beginning(processing_class) + row["prompt"]
            row["completion"] = row["completion"].removesuffix(end) + end
        rows.append({**row, "images": images})
    inputs = collate(rows)
    # Empty prompts alone have no tokens, in a tensor of floats, which makes floats of what it is joined with.
    for name in ("input_ids", "attention_mask", "labels"):
        inputs[name] = inputs[name].long()
    return inputs


def _beginning(processing_class: ProcessingClass) -> str:
    """The token that the tokenizer itself puts before a text, as the trainer lets it do with plain text."""
    tokenizer = tokenizer_of(processing_class)
    return tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
