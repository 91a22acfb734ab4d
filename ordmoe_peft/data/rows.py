"""What a row of a data set may be: it has its columns and text in them, and it fits into the model's positions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PretrainedConfig

from ..errors import OrdMoEDataError


CONVERSATIONS = ("messages", "conversations")
ANSWER_ROLES = ("assistant", "gpt")
# A stream may have no end: if its first rows have no answer, as many as this, it is taken to have none.
MOST_EMPTY_ROWS = 1000


# ------------------------------------------------------------------------------------------------------------- columns
def check_columns(dataset: Any, needed: Sequence[str], needed_by: str, data_format: str) -> None:
    """Raise [`OrdMoEDataError`] unless the data set has the columns; `needed_by` says who needs them, with a verb."""
    missing = [repr(name) for name in needed if name not in dataset.column_names]
    if missing:
        raise OrdMoEDataError(
            f"The data set has no column {' and no column '.join(missing)}, which {needed_by}; it has "
            f"{sorted(dataset.column_names)}. Use TRL's {data_format} format."
        )


def check_samples(dataset: Any, group_by: str | None = None) -> None:
    """Raise [`OrdMoEDataError`] unless rows have prompts, answers to compare with, and the column to group by."""
    columns = ("prompt", "completion")
    check_columns(dataset, columns, "evaluation needs", "prompt-completion")
    if group_by is not None and group_by not in dataset.column_names:
        raise OrdMoEDataError(f"group_by={group_by!r} is not a column; there are {sorted(dataset.column_names)}.")
    first_row(dataset, "evaluation")
    check_texts(dataset, columns, "evaluation")


def first_row(dataset: Any, name: str) -> dict[str, Any]:
    """The first row; raises [`OrdMoEDataError`] if the data set called `name` has none."""
    row = next(iter(dataset), None)
    if row is None:
        raise OrdMoEDataError(f"The {name} data set has no samples. Look at its split, and at what filters it.")
    return row


def column_values(dataset: Dataset, column: str) -> Iterator[Any]:
    """A column's values, row by row, images as bytes."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        yield from table.column(column).to_pylist()


# --------------------------------------------------------------------------------------------------------------- texts
def check_texts(dataset: Dataset, columns: Sequence[str], name: str, may_be_empty: bool = False) -> None:
    """See that each of `columns` has text in every row, and is not empty in all of them, unless it may be.

    An empty prompt counts as a prompt; an empty answer among others teaches where to stop.

    Raises:
        [`OrdMoEDataError`]: names the column, and the row (counted from 0).
    """
    for column in columns:
        values = enumerate(column_values(dataset, column))
        are_empty = [_is_empty(row_texts(value, column, row, name)) for row, value in values]
        if column != "prompt" and not may_be_empty and all(are_empty):
            raise _no_answers(column, name, f"{len(dataset)} rows")


def checked_stream(
    dataset: IterableDataset, columns: Sequence[str], name: str, may_be_empty: bool = False
) -> IterableDataset:
    """The stream, which raises what [`check_texts`] does when a row without text, or too many empty ones, are read."""
    empty_rows = {} if may_be_empty else {column: 0 for column in columns if column != "prompt"}

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        for column in columns:
            if not _is_empty(row_texts(row.get(column), column, index, name)):
                empty_rows.pop(column, None)
            elif column in empty_rows:
                empty_rows[column] += 1
            if empty_rows.get(column) == MOST_EMPTY_ROWS:
                raise _no_answers(column, name, f"of the first {MOST_EMPTY_ROWS} rows read")
        return row

    return dataset.map(check, with_indices=True, features=dataset.features)  # which map would forget


def row_texts(value: Any, column: str, row: int, name: str) -> list[str]:
    """The texts of a row's column; of a whole conversation the assistant's, where it says something.

    Raises:
        [`OrdMoEDataError`]: there is no text, or a message without.
    """
    messages = value if isinstance(value, list) else [{"content": value}]
    texts = [_message_text(message) for message in messages]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise OrdMoEDataError(
            f"Row {row} (counted from 0) of the {name} data set has {str(value)[:200]} in `{column}`: it must be text, "
            "or messages with text. Mend or drop such rows."
        )
    is_answer = [message.get("role", message.get("from")) in ANSWER_ROLES for message in messages]
    if column in CONVERSATIONS and any(is_answer):
        return [text for text, is_one in zip(texts, is_answer, strict=True) if is_one]
    return texts


def _message_text(message: Any) -> Any:
    """A message's text; something else than a string, where it has none."""
    if not isinstance(message, dict):
        return None
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        texts = [part.get("text") or "" for part in content if isinstance(part, dict)]
        has_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        return "".join(texts) if has_text else None
    # A message may do something else than speak, such as call a tool.
    others = [part for key, part in message.items() if key not in ("role", "from", "content", "value") and part]
    return str(others) if content is None and others else content


def _is_empty(texts: list[str]) -> bool:
    return not any(text.strip() for text in texts)


def _no_answers(column: str, name: str, rows: str) -> OrdMoEDataError:
    return OrdMoEDataError(f"The column `{column}` of the {name} data set is empty in all {rows}: no answers.")


# -------------------------------------------------------------------------------------------------------------- length
def num_positions(config: PretrainedConfig) -> int | None:
    """The longest row that the text model of `config` is made for, in tokens; None where it says none.

    Some configurations give the positions before their rotary embedding is stretched by a factor, and some after.
    """
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        return None
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_layer_type = [part for part in parameters.values() if isinstance(part, dict)]
    ropes = [rope for rope in by_layer_type or [parameters] if rope.get("factor")]
    stretched = [rope["factor"] * (rope.get("original_max_position_embeddings") or positions) for rope in ropes]
    return int(max([positions, *stretched]))


def check_length(length: int, positions: int | None, what: str) -> None:
    """Raise [`OrdMoEDataError`] if `length` tokens are more than `positions`."""
    if positions is not None and length > positions:
        raise OrdMoEDataError(
            f"{what} has {length} tokens, and the model has {positions} positions (max_position_embeddings). Shorten "
            "or drop such rows; in training, max_length cuts them."
        )


def check_fits(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise [`OrdMoEDataError`] if a row of `inputs` has more tokens, padding aside, than `model` has positions."""
    positions = num_positions(model.config)
    if positions is not None and "input_ids" in inputs and inputs["input_ids"].shape[1] > positions:
        mask_BS = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        check_length(int(mask_BS.sum(1).max()), positions, "A sample")


def check_room(prompt_length: int, new_tokens: int, positions: int | None) -> None:
    """Raise [`OrdMoEDataError`] if a prompt and a response of `new_tokens` are more than `positions`."""
    if positions is not None and prompt_length + new_tokens > positions:
        raise OrdMoEDataError(
            f"A prompt has {prompt_length} tokens and its response may get {new_tokens}, and the model has {positions} "
            "positions (max_position_embeddings). Lower max_completion_length, or shorten or drop such rows."
        )
