import pytest
import torch

from ordmoe_peft.data.generation import with_responses
from ordmoe_peft.errors import OrdMoEDataError
from ordmoe_peft.training.row_layout.separate import left_padded_prompts, separate_rows, stack_rows


def batch():
    """Prompts 1 2 and 1 2 3, answered by 5 6 and 7; pad is 0."""
    return {
        "input_ids": torch.tensor([[1, 2, 5, 6], [1, 2, 3, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]]),
        "token_type_ids": torch.tensor([[9, 8, 7, 6], [9, 8, 7, 6]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [-100, -100, -100, 7]]),
        "pixel_values": torch.arange(6.0).view(3, 2),
        "fused_lm_head": True,
    }


def test_prompts_move_to_the_right():
    prompts = left_padded_prompts(batch(), pad_token_id=0)
    assert prompts["input_ids"].tolist() == [[0, 1, 2], [1, 2, 3]]
    assert prompts["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert prompts["token_type_ids"].tolist() == [[0, 9, 8], [9, 8, 7]]
    assert torch.equal(prompts["pixel_values"], batch()["pixel_values"])
    assert prompts.keys() == {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}


def test_rows_without_labels_are_all_prompt():
    rows = batch() | {"labels": torch.full((2, 4), -100), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    assert left_padded_prompts(rows, 0)["input_ids"].tolist() == [[0, 1, 2, 5], [1, 2, 3, 7]]


def test_a_row_that_is_all_response_is_refused():
    rows = batch() | {"labels": batch()["input_ids"]}
    with pytest.raises(OrdMoEDataError, match="Generated responses need prompts"):
        left_padded_prompts(rows, 0)


def test_batches_stack_to_the_widest():
    prompts = left_padded_prompts(batch(), pad_token_id=0)
    wide = with_responses(prompts, torch.tensor([[11, 12, 13]] * 2), torch.ones(2, 3, dtype=torch.bool))
    rows = stack_rows([batch(), wide], pad_token_id=0)
    assert rows["input_ids"].tolist() == [
        [1, 2, 5, 6, 0, 0],
        [1, 2, 3, 7, 0, 0],
        [0, 1, 2, 11, 12, 13],
        [1, 2, 3, 11, 12, 13],
    ]
    assert rows["labels"][1].tolist() == [-100, -100, -100, 7, -100, -100]
    assert rows["attention_mask"].sum(1).tolist() == [4, 4, 5, 6]
    assert torch.equal(rows["pixel_values"], torch.cat([batch()["pixel_values"]] * 2))
    assert rows["fused_lm_head"] is True


def test_rows_of_several_tiers_stand_after_one_another():
    short = {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[-100, 5]])}
    long = {"input_ids": torch.tensor([[4, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    rows = separate_rows([short, long], [1, 3], "response", pad_token_id=0)
    assert rows.inputs["input_ids"].tolist() == [[4, 5, 0], [4, 6, 7]]
    assert rows.tiers.tolist() == [[1, 1, 1], [3, 3, 1]]
    assert separate_rows([short, long], [1, 3], "sequence", pad_token_id=0).tiers.tolist() == [1, 3]
    assert rows.first_mask.tolist() == [[1, 1, 1]], "no mask, as in padding-free rows"
    assert rows.first_group(torch.arange(6)).tolist() == [0, 1, 2]
