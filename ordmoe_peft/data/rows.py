"""What a row of a data set may be: it has its columns and text in them, and it fits into the model's positions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, concatenate_datasets
from torch import nn
from transformers import PretrainedConfig

from ..errors import OrdMoEDataError


CONVERSATIONS = ("messages", "conversations")
ANSWER_ROLES = ("assistant", "gpt")
# Who may speak.
ROLES = ("system", "developer", "user", "assistant", "tool")
# Who else may in `conversations`, where ShareGPT's names for user and assistant become those.
SHAREGPT_ROLES = ("human", "gpt")
# What a part of a message may be. Chat templates pass over others, and over those that do not say.
PARTS = {"text", "image", "image_url"}
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
    check_columns(dataset, columns, "evaluation needs", "prompt-completion, messages or text")
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
    feature = dataset.features[column]
    is_stored_as_json = "Json(" in repr(feature)
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        values = table.column(column).to_pylist()
        yield from ([_from_json(value, feature) for value in values] if is_stored_as_json else values)


def with_column(dataset: Dataset, column: str, values: list[Any], feature: Any) -> Dataset:
    """The data set with `values` as the column, in place of one of this name."""
    others = dataset.remove_columns(column) if column in dataset.column_names else dataset
    new = Dataset.from_dict({column: values}, features=Features({column: feature}), split=dataset.split)
    joined = concatenate_datasets([others, new], split=dataset.split, axis=1) if others.column_names else new
    joined.info.dataset_name, joined.info.config_name = dataset.info.dataset_name, dataset.info.config_name
    return joined


def _from_json(value: Any, feature: Any) -> Any:
    """What `value` stands for where `datasets` keeps it, or a part of it, as a string of JSON."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return feature.decode_example(value)
    if isinstance(feature, List | LargeList):
        return [_from_json(part, feature.feature) for part in value]
    if isinstance(feature, dict):
        return {name: _from_json(value[name], part) for name, part in feature.items()}
    return value


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
    problem = text_problem(value, column)
    if problem is not None:
        raise OrdMoEDataError(
            f"Row {row} (counted from 0) of the {name} data set has {str(value)[:200]} in `{column}`: {problem}. Mend "
            "or drop such rows."
        )
    messages = value if isinstance(value, list) else [{"content": value}]
    texts = [_message_text(message) for message in messages]
    is_answer = [message.get("role", message.get("from")) in ANSWER_ROLES for message in messages]
    if column in CONVERSATIONS and any(is_answer):
        return [text for text, is_one in zip(texts, is_answer, strict=True) if is_one]
    return texts


def text_problem(value: Any, column: str) -> str | None:
    """What is wrong with a row's `value` in a column of text or messages; None where nothing is."""
    if isinstance(value, str):
        return f"`{column}` must be a list of messages" if column in CONVERSATIONS else None
    if not isinstance(value, list) or not value:
        return "it must be text, or messages with text"
    roles = ROLES + SHAREGPT_ROLES if column == "conversations" else ROLES
    for place, message in enumerate(value):
        if not isinstance(message, dict):
            return f"its message {place} (counted from 0) must have a role and a content"
        role = message.get("role", message.get("from") if column == "conversations" else None)
        if role not in roles:
            return f"its message {place} (counted from 0) has the role {role!r}; known are {', '.join(roles)}"
        parts = message["content"] if isinstance(message.get("content"), list) else []
        kinds = [part.get("type") for part in parts if isinstance(part, dict)]
        if set(kinds) - PARTS:
            kind = next(kind for kind in kinds if kind not in PARTS)
            return (
                f"its message {place} (counted from 0) has a part of the type {kind!r}; known are "
                f"{', '.join(sorted(PARTS))}"
            )
        if not isinstance(_message_text(message), str):
            return f"its message {place} (counted from 0) has no text"
    return None


def _message_text(message: dict[str, Any]) -> Any:
    """A message's text; something else than a string, where it has none."""
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
