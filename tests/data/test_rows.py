"""Rows without text are named, and answers that are all empty; rows that are longer than the model's positions."""

import pytest
import torch
from datasets import Dataset, Features, Json, List, Value
from transformers import GptOssConfig, PretrainedConfig, Qwen3MoeConfig, Qwen3VLMoeConfig

from ordmoe_peft.data.rows import (
    MOST_EMPTY_ROWS,
    check_fits,
    check_samples,
    check_texts,
    checked_stream,
    column_values,
    first_row,
    num_positions,
    row_texts,
    text_problem,
    with_column,
)
from ordmoe_peft.errors import OrdMoEDataError
from tests import models


def says(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("column", "value", "texts"),
    [
        ("completion", "yes", ["yes"]),
        ("completion", [says("assistant", "yes")], ["yes"]),
        ("completion", [says("assistant", [{"type": "text", "text": "yes"}, {"type": "image"}])], ["yes"]),
        ("messages", [says("user", "why"), says("assistant", "so")], ["so"]),
        ("messages", [says("user", "why")], ["why"]),
        ("conversations", [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}], ["so"]),
        ("messages", [says("assistant", None, tool_calls="add")], ["['add']"]),
    ],
)
def test_the_texts_of_a_row(column, value, texts):
    assert row_texts(value, column, 0, "training") == texts


@pytest.mark.parametrize(
    "value",
    [
        *(None, [], 3, [says("assistant", None)], [says("user", "a"), says("assistant", None, tool_calls=None)]),
        *(["w30", "w31"], [None], [says("assistant", ["w30"])], [says("assistant", [{"type": "text", "text": 3}])]),
    ],
)
def test_a_row_without_text_is_named(value):
    with pytest.raises(OrdMoEDataError, match=r"Row 7 \(counted from 0\) of the training data set .* in `messages`"):
        row_texts(value, "messages", 7, "training")


def test_only_answers_that_are_all_empty_are_refused():
    some = Dataset.from_dict({"prompt": ["", ""], "completion": ["", "yes"]})
    check_texts(some, ["prompt", "completion"], "training")
    none = Dataset.from_dict({"prompt": ["why", "how"], "completion": ["", " \n"]})
    with pytest.raises(OrdMoEDataError, match="column `completion` of the training data set is empty in all 2 rows"):
        check_texts(none, ["prompt", "completion"], "training")
    check_texts(none, ["prompt", "completion"], "training", may_be_empty=True)


def test_a_stream_whose_first_answers_are_all_empty():
    def read(*answers, **kwargs):
        rows = Dataset.from_dict({"prompt": ["why"] * len(answers), "completion": answers}).to_iterable_dataset()
        return len(list(checked_stream(rows, ["prompt", "completion"], "training", **kwargs)))

    empty = [" "] * MOST_EMPTY_ROWS
    with pytest.raises(OrdMoEDataError, match="`completion` of the training .* all of the first 1000 rows read"):
        read(*empty)
    assert read(*empty, may_be_empty=True) == MOST_EMPTY_ROWS
    assert read(*empty[1:], "yes", *empty) == 2 * MOST_EMPTY_ROWS


def test_rows_are_counted_over_batches_and_as_they_are_selected():
    rows = Dataset.from_dict({"completion": ["yes"] * 1500 + [None] + ["no"]})
    for chosen, row in ((rows, 1500), (rows.select([3, 1500]), 1)):
        with pytest.raises(OrdMoEDataError, match=rf"Row {row} .* None in `completion`"):
            check_texts(chosen, ["completion"], "training")


def test_values_that_datasets_keeps_as_json():
    messages = [says("user", "3"), says("assistant", None, tool_calls=[{"a": 1}]), says("tool", "x", name="f")]
    rows = Dataset.from_dict({"messages": [messages]}, features=Features({"messages": List(Json())}))
    assert list(column_values(rows, "messages")) == [messages]
    check_texts(rows, ["messages"], "training")


def test_a_column_in_place_of_another_keeps_split_and_name():
    rows = Dataset.from_dict({"a": [1, 2], "b": [3, 4]}, split="test")
    rows.info.dataset_name = "mine"
    changed = with_column(rows, "a", ["x", "y"], Value("string"))
    assert list(changed) == [{"b": 3, "a": "x"}, {"b": 4, "a": "y"}]
    assert (str(changed.split), changed.info.dataset_name) == ("test", "mine")
    assert str(with_column(rows.remove_columns("b"), "a", ["x", "y"], Value("string")).split) == "test"


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("messages", "why", "`messages` must be a list of messages"),
        ("messages", [says("user", "a"), says("human", "b")], "message 1 (counted from 0) has the role 'human'"),
        ("conversations", [{"from": "bard", "value": "a"}], "has the role 'bard'; known are system, developer, user"),
        ("conversations", [{"from": "human", "value": "a"}], None),
        ("prompt", ["a"], "message 0 (counted from 0) must have a role and a content"),
    ],
)
def test_what_is_wrong_with_a_value(column, value, problem):
    found = text_problem(value, column)
    assert found is None if problem is None else problem in found


def test_no_rows():
    with pytest.raises(OrdMoEDataError, match="The evaluation data set has no samples"):
        first_row(Dataset.from_dict({"prompt": []}), "evaluation")


@pytest.mark.parametrize(
    ("columns", "group_by", "message"),
    [
        (["prompt"], None, r"no column 'completion', which evaluation needs; it has \['prompt'\]. Use TRL's prompt-c"),
        ([], None, "no column 'prompt' and no column 'completion', which evaluation needs"),
        (["prompt", "completion"], "kind", r"group_by='kind' is not a column; there are \['completion', 'prompt'\]"),
    ],
)
def test_columns_that_evaluation_needs(columns, group_by, message):
    with pytest.raises(OrdMoEDataError, match=message):
        check_samples(Dataset.from_dict({name: ["a"] for name in columns}), group_by)


def yarn(factor, original):
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": original}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (Qwen3MoeConfig(max_position_embeddings=300), 300),
        (Qwen3MoeConfig(max_position_embeddings=300, rope_parameters=yarn(4.0, 300)), 1200),
        (Qwen3MoeConfig(max_position_embeddings=1200, rope_parameters=yarn(4.0, 300)), 1200),
        (GptOssConfig(), 131072),
        (Qwen3VLMoeConfig(text_config={"max_position_embeddings": 70}), 70),
    ],
    ids=str,
)
def test_positions(config, positions):
    assert num_positions(config) == positions


def test_some_models_have_no_bound():
    assert num_positions(PretrainedConfig()) is None


def test_padding_takes_no_positions():
    model = models.qwen3_moe(max_position_embeddings=6)
    batch = models.text_batch(rows=1, length=8, padding=2)
    check_fits(model, batch)
    check_fits(model, {"input_ids": torch.ones(1, 6, dtype=torch.long)})
    for mask in ({"attention_mask": torch.ones(1, 8)}, {}):
        with pytest.raises(OrdMoEDataError, match="A sample has 8 tokens, and the model has 6 positions"):
            check_fits(model, {"input_ids": batch["input_ids"], **mask})
