"""The texts in a data set's columns, and what is wrong with them: rows without, and answers that are all empty."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from ..errors import OrdMoEDataError


CONVERSATIONS = ("messages", "conversations")
ANSWER_ROLES = ("assistant", "gpt")
# A stream has no end to wait for: as many of its rows without an answer are taken for all.
MOST_EMPTY_ROWS = 1000


def first_row(dataset: Any, name: str) -> dict[str, Any]:
    """The first row; raises [`OrdMoEDataError`] if the data set called `name` has none."""
    row = next(iter(dataset), None)
    if row is None:
        raise OrdMoEDataError(f"The {name} data set has no samples. Look at its split, and at what filters it.")
    return row


def check_texts(dataset: Dataset, columns: Sequence[str], name: str, may_be_empty: bool = False) -> None:
    """See that each of `columns` has text in every row, and is not empty in all of them, unless it may be.

    An empty prompt is one; an empty answer among others teaches where to stop.

    Raises:
        [`OrdMoEDataError`]: names the column, and the row (counted from 0).
    """
    for column in columns:
        texts = [row_texts(value, column, row, name) for row, value in enumerate(column_values(dataset, column))]
        if column != "prompt" and not may_be_empty and not any(text.strip() for row in texts for text in row):
            raise OrdMoEDataError(
                f"The column `{column}` of the {name} data set is empty in all {len(dataset)} rows: no answers."
            )


def checked_stream(
    dataset: IterableDataset, columns: Sequence[str], name: str, may_be_empty: bool = False
) -> IterableDataset:
    """The stream, which raises what [`check_texts`] does when a row without text, or too many empty ones, are read."""
    empty_rows = {} if may_be_empty else {column: 0 for column in columns if column != "prompt"}

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        for column in columns:
            texts = row_texts(row.get(column), column, index, name)
            if column in empty_rows and any(text.strip() for text in texts):
                del empty_rows[column]
            elif column in empty_rows:
                empty_rows[column] += 1
        for column, count in empty_rows.items():
            if count == MOST_EMPTY_ROWS:
                raise OrdMoEDataError(
                    f"The column `{column}` of the {name} data set is empty in all of the first {count} rows read: no "
                    "answers."
                )
        return row

    return dataset.map(check, with_indices=True, features=dataset.features)  # which map would forget


def column_values(dataset: Dataset, column: str) -> Iterator[Any]:
    """A column's values, row by row, images as bytes."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        yield from table.column(column).to_pylist()


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
        texts = [part.get("text") or "" if isinstance(part, dict) else None for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    # A message may do something else than speak, such as call a tool.
    others = [part for key, part in message.items() if key not in ("role", "from", "content", "value") and part]
    return str(others) if content is None and others else content
