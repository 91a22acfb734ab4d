"""Whole conversations and texts as prompts and completions, for what answers and scores samples."""

from collections.abc import Iterable
from typing import Any

from datasets import Dataset, Features, Json, List, Value, concatenate_datasets

from ..errors import OrdMoEDataError
from .rows import CONVERSATIONS, column_values
from .shards import without_inner_bars


# What ShareGPT calls the fields of a message, and who speaks → what chat templates know.
FIELDS = {"from": "role", "value": "content"}
SPEAKERS = {"human": "user", "gpt": "assistant"}
TEXT = Value("string")


def chat_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with `role` and `content`, from ShareGPT's `from` and `value` if need be."""
    message = {FIELDS.get(key, key): value for key, value in message.items()}
    return {**message, "role": SPEAKERS.get(message["role"], message["role"])}


def _message_features(feature: Any) -> Any:
    """The feature of messages that were read as `feature`, after [`chat_message`]."""
    if isinstance(feature, List) and isinstance(feature.feature, dict):
        return List({FIELDS.get(key, key): part for key, part in feature.feature.items()})
    return List(Json())


def as_messages(dataset: Any) -> Any:
    """A data set, or a stream, with `conversations` as TRL's `messages`: `human` becomes `user`, `gpt` `assistant`.

    TRL leaves the speakers' names as they are, so that a chat template would write `human`; and it does not take a
    column `conversations` that has roles and contents. Other data sets are returned as they are.
    """
    names = getattr(dataset, "column_names", None) or []
    if "conversations" not in names or {"messages", "prompt", "input_ids"} & set(names):
        return dataset
    features = None
    if dataset.features is not None:
        features = dataset.features.copy()
        features["messages"] = _message_features(features.pop("conversations"))

    def rename(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [chat_message(message) for message in row["conversations"]]}

    with without_inner_bars():
        return dataset.map(rename, remove_columns=["conversations"], features=features)


def as_prompt_completion(dataset: Dataset, needs_answers: bool = False) -> Dataset:
    """The data set in TRL's prompt-completion format.

    - Of `messages` or `conversations`, the last message is the completion if the assistant says it, and all before it
      are the prompt. Without such an answer the whole conversation is the prompt, and the completion is null.
    - `text` is the completion to an empty prompt: there is nothing to answer, and all of it is scored.
    - What has a `prompt` is returned as it is, and what has none of these, too.

    Args:
        dataset ([`~datasets.Dataset`]): in one of TRL's formats, with or without images.
        needs_answers (`bool`, defaults to `False`): whether each row must have one.

    Raises:
        [`OrdMoEDataError`]: a row of a conversation has no answer, or nothing before it. Names the row.
    """
    names = dataset.column_names
    check_images_go_with(names)
    if "prompt" in names:
        return dataset
    column = next((name for name in CONVERSATIONS if name in names), None)
    if column is None and "text" in names:
        for row, value in enumerate(column_values(dataset, "text")):
            if not value.strip():
                raise _row_error(row, "text", value, "is empty, so there is nothing to score")
        dataset = dataset.rename_column("text", "completion")
        return dataset.add_column("prompt", [""] * len(dataset), feature=TEXT)
    if column is None:
        return dataset
    prompts: list[list[dict[str, Any]]] = []
    completions: list[list[dict[str, Any]] | None] = []
    for row, value in enumerate(column_values(dataset, column)):
        messages = [chat_message(message) for message in value]
        is_answered = bool(messages) and messages[-1]["role"] == "assistant"
        if needs_answers and not is_answered:
            raise _row_error(row, column, value, "ends without a message of the assistant, so there is no answer")
        if is_answered and len(messages) == 1:
            raise _row_error(row, column, value, "has an answer, and nothing before it")
        prompts.append(messages[:-1] if is_answered else messages)
        completions.append(messages[-1:] if is_answered else None)
    feature = _message_features(dataset.features[column])
    columns: dict[str, list[Any]] = {"prompt": prompts}
    features = {"prompt": feature}
    if any(completions):
        columns["completion"], features["completion"] = completions, feature
    texts = Dataset.from_dict(columns, features=Features(features))
    others = dataset.remove_columns([name for name in (column, "completion") if name in names])
    return concatenate_datasets([others, texts], split=dataset.split, axis=1) if others.column_names else texts


def _row_error(row: int, column: str, value: Any, problem: str) -> OrdMoEDataError:
    return OrdMoEDataError(f"Row {row} (counted from 0) {problem}: {str(value)[:200]} in `{column}`. Mend or drop it.")


def check_images_go_with(names: Iterable[str]) -> None:
    """Raise [`OrdMoEDataError`] for two columns of images, or one beside texts or tools that TRL then leaves out."""
    found = {"image", "images"} & set(names)
    if len(found) == 2:
        raise OrdMoEDataError("The data set has images in `image` and in `images`, and one is used. Drop one of both.")
    if "tools" in names and found:
        raise OrdMoEDataError(
            f"The data set has `tools` and images in `{found.pop()}`, and TRL renders no tools where there are images. "
            "Drop one of both columns."
        )
    if "text" in names and found and not {"prompt", *CONVERSATIONS} & set(names):
        raise OrdMoEDataError(
            f"The data set has `text` and images in `{found.pop()}`: nothing says where in the text an image stands. "
            "Give `messages`, or `prompt` and `completion`."
        )


def has_prompts(dataset: Dataset) -> bool:
    """Whether there is something to answer: no for data whose prompts are all the empty text.

    Raises:
        [`OrdMoEDataError`]: some prompts are empty, and others are not. Names the first row.
    """
    are_empty = [not prompt for prompt in column_values(dataset, "prompt")]
    if any(are_empty) and not all(are_empty):
        raise OrdMoEDataError(
            f"Row {are_empty.index(True)} (counted from 0) has an empty `prompt`, and a model answers none. Mend or "
            "drop such rows. Where all prompts are empty, the answers are scored, and nothing is generated."
        )
    return not all(are_empty)
