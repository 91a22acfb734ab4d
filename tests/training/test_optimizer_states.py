"""Sizes of optimizer states, and what of them does not exist yet. By hand: `tests/tools/plan/test_optimizers.py`."""

import pytest
import torch

from ordmoe_peft.training.optimizer_states import missing_bytes, optimizer_bytes


def test_an_optimizer_that_is_not_known_is_taken_for_adamw():
    parameter = torch.nn.Parameter(torch.ones(8, 8))
    assert optimizer_bytes("lion_32bit", [parameter]) == optimizer_bytes("adamw_torch", [parameter])
    assert optimizer_bytes("adamw_torch", []) == 0


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit"])
def test_states_that_exist_are_not_missing(name):
    """Of two weights of 8 x 8, one had a gradient in the first step; a third is frozen."""
    weights = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(3)]
    weights[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(weights)
    assert missing_bytes(name, optimizer) == optimizer_bytes(name, weights[:2])
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert missing_bytes(name, optimizer) == optimizer_bytes(name, weights[:1])
    weights[1].grad = torch.ones_like(weights[1])
    optimizer.step()
    assert missing_bytes(name, optimizer) == 0
    assert weights[2] not in optimizer.state
