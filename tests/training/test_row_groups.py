"""Which rows a micro-batch has, and which tier routes them."""

import pytest
import torch

from ordmoe_peft.training.row_groups import row_groups


BATCH = {"input_ids": torch.ones(2, 3, dtype=torch.long), "images": ["a", "b"]}


def test_reference_responses_are_the_batch_under_each_tier():
    groups = row_groups(BATCH, [3, 4], None, "tier")
    assert [(group.tier, group.routed_by) for group in groups] == [(1, 1), (3, 3), (4, 4)]
    assert all(group.inputs["input_ids"] is BATCH["input_ids"] for group in groups)


@pytest.mark.parametrize(("scored_by", "routed_by"), [("tier", [1, 1, 3]), ("policy", [1, 1, 1])])
def test_generated_responses_come_after_the_batch(scored_by, routed_by):
    generated = [{"input_ids": torch.full((2, 4), tier)} for tier in (1, 3)]
    groups = row_groups(BATCH, [1, 3], generated, scored_by)
    assert [group.tier for group in groups] == [0, 1, 3]
    assert [group.routed_by for group in groups] == routed_by
    assert [int(group.inputs["input_ids"][0, 0]) for group in groups] == [1, 1, 3]
    assert all(group.inputs["images"] == ["a", "b"] for group in groups)
