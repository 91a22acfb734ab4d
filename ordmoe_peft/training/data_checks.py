"""What is wrong with a data set to train on, said before the first step as far as it can be."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils import logging

from ..data.formats import as_messages, check_images_go_with
from ..data.rows import (
    ANSWER_ROLES,
    CONVERSATIONS,
    check_length,
    check_room,
    check_texts,
    checked_stream,
    column_values,
    first_row,
)
from ..errors import OrdMoEConfigError, OrdMoEDataError
from ..tiers.scope import IGNORED_LABEL


logger = logging.get_logger(__name__)


def checked_data(dataset: Any, args: Any, name: str) -> Any:
    """The data set, which has rows, text in each, and not only empty answers; a stream is checked as it is read.

    `conversations` become `messages`, see [`~ordmoe_peft.data.formats.as_messages`].

    Args:
        dataset: a data set in one of TRL's formats, several by name, or None.
        args ([`OrdMoETrainingArguments`]): say which column holds plain text, and whether answers are needed.
        name (`str`): what messages call it.

    Raises:
        [`OrdMoEDataError`]: names the column, and the row (counted from 0).
    """
    if isinstance(dataset, dict):
        return type(dataset)({key: checked_data(part, args, f"{name} ({key})") for key, part in dataset.items()})
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset  # TRL says what it takes
    given = list(first_row(dataset, name))
    columns = [
        column for column in ("prompt", "completion", *CONVERSATIONS, args.dataset_text_field) if column in given
    ]
    check_images_go_with(given)
    if "input_ids" in given or (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
        columns = []  # rows are tokenized, or made when they are read
    may_be_empty = args.responses == "generated" and args.ntp_coef == 0
    if isinstance(dataset, IterableDataset):
        return as_messages(checked_stream(dataset, columns, name, may_be_empty) if columns else dataset)
    check_texts(dataset, columns, name, may_be_empty)
    if args.assistant_only_loss:
        check_answered(dataset, [column for column in columns if column in CONVERSATIONS], name)
    return as_messages(dataset)


def check_answered(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Raise [`OrdMoEDataError`] if a conversation has no message of the assistant, which alone would be learnt."""
    for column in columns:
        for row, messages in enumerate(column_values(dataset, column)):
            if not any(message.get("role", message.get("from")) in ANSWER_ROLES for message in messages):
                raise OrdMoEDataError(
                    f"Row {row} (counted from 0) of the {name} data set has {str(messages)[:200]} in `{column}`: no "
                    "message of the assistant, and assistant_only_loss=True learns nothing else. Mend or drop it."
                )


def check_trainable(model: PeftModel) -> None:
    """Raise [`OrdMoEConfigError`] if `model`'s active adapters are merged, or none of their parameters is trainable."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters} & set(model.active_adapters))
    if merged:
        raise OrdMoEConfigError(
            f"The active adapter {', '.join(map(repr, merged))} is merged into the base's weights, out of "
            "training's reach. Call model.unmerge_adapter() first."
        )
    trainable = [f".{name}." for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not any(f".{adapter}." in name for name in trainable for adapter in model.active_adapters):
        raise OrdMoEConfigError(
            f"Nothing of the active adapter {', '.join(map(repr, model.active_adapters))} is trainable. To train an "
            "adapter further, load it by PeftModel.from_pretrained(model, adapter, is_trainable=True)."
        )


def check_prepared(dataset: Any, args: Any, num_given: int | None, positions: int | None) -> None:
    """See that what TRL made of a data set still has something to learn from, and fits into the model's positions.

    Rows that are tokenized when they are read, as those of streams and with images, are checked step by step instead.

    Args:
        dataset: what TRL made of it.
        args ([`OrdMoETrainingArguments`]): what it was cut by.
        num_given (`int`, *optional*): rows that it was made from.
        positions (`int`, *optional*): the model's positions.

    Raises:
        [`OrdMoEDataError`]: no row has a response, or one is too long.
    """
    if next(iter(dataset), None) is None:
        raise OrdMoEDataError(
            f"No row is left to train on: max_length={args.max_length} with truncation_mode={args.truncation_mode!r} "
            "cuts the whole response from every row. Set max_length higher, or shorten the prompts."
        )
    if not isinstance(dataset, Dataset) or not {"input_ids", "labels"} <= set(dataset.column_names):
        return
    # The first label is no token's next.
    if all(label == IGNORED_LABEL for labels in column_values(dataset, "labels") for label in labels[1:]):
        raise OrdMoEDataError(f"No row has a response to learn from: all labels of all {len(dataset)} rows are masked.")
    if args.packing:
        return
    if num_given is not None and len(dataset) < num_given:
        logger.warning(
            f"{num_given - len(dataset)} of {num_given} rows are left out: max_length={args.max_length} cuts their "
            "whole response."
        )
    is_in_order = not args.shuffle_dataset and len(dataset) == num_given
    for row, ids in enumerate(column_values(dataset, "input_ids")):
        check_length(len(ids), positions, f"Row {row} (counted from 0)" if is_in_order else "A row")


def check_room_to_write(dataset: Any, new_tokens: int, positions: int | None) -> None:
    """Raise [`OrdMoEDataError`] if a prompt of a prepared data set and `new_tokens` are more than `positions`."""
    if isinstance(dataset, Dataset) and "labels" in dataset.column_names:
        check_room(max(map(_prompt_length, column_values(dataset, "labels"))), new_tokens, positions)


def _prompt_length(labels: Sequence[int]) -> int:
    return next((length for length, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
