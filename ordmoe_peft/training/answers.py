"""What a training set has to learn from: whole answers, or with generated responses prompts alone."""

from typing import Any

from transformers.utils import logging

from ..errors import OrdMoEDataError
from .arguments import OrdMoETrainingArguments


logger = logging.get_logger(__name__)

# Any of these sets of columns holds answers to learn from, in TRL's data set formats.
ANSWER_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}, {"input_ids"})
EMPTY_ANSWER = [{"role": "assistant", "content": ""}]


def with_answers(dataset: Any, args: OrdMoETrainingArguments) -> Any:
    """The data set as TRL takes it: prompts alone, where they suffice, get empty answers.

    Warns of whole conversations, prompts and answers in one column, where prompts count as answers.

    Raises:
        [`OrdMoEDataError`]: there are no answers to learn from, and some are needed.
    """
    columns = set(getattr(dataset, "column_names", None) or [])
    if {"messages", "conversations"} & columns and not args.assistant_only_loss:
        logger.warning(
            "The data set has whole conversations and assistant_only_loss is off, so prompts count as part of the "
            "responses that tiers are ranked on. Set assistant_only_loss=True, or give `prompt` and `completion`."
        )
    check_answers(dataset, args)
    if not columns or any(needed <= columns for needed in ANSWER_COLUMNS):
        return dataset
    return dataset.map(lambda row: {"completion": "" if isinstance(row["prompt"], str) else EMPTY_ANSWER})


def check_answers(dataset: Any, args: OrdMoETrainingArguments) -> None:
    """Raise [`OrdMoEDataError`] for columns without answers to learn from, where some are needed."""
    columns = set(getattr(dataset, "column_names", None) or [])
    has_answers = not columns or any(needed <= columns for needed in ANSWER_COLUMNS)
    if has_answers:
        return
    if {"chosen", "rejected"} & columns:
        raise OrdMoEDataError(
            f"The data set has preferences ({sorted(columns)}): OrdMoE makes its own, of what tiers answer. To train "
            "on the chosen answers, rename `chosen` to `completion` beside `prompt`, or to `messages` where it is the "
            "whole conversation, and drop `rejected`. For preferences as they are, train a LoRA by TRL's DPOTrainer."
        )
    if "prompt" not in columns or args.ntp_coef > 0 or args.responses == "reference":
        raise OrdMoEDataError(
            f"The data set has the columns {sorted(columns)}, none of which holds an answer to learn from. It needs "
            "`prompt` and `completion`, or `messages`, or `text` (TRL's data set formats). Prompts alone suffice with "
            "responses='generated' and ntp_coef=0, which is not advised."
        )
