"""Sizes of optimizer states."""

import pytest
import torch

from ordmoe_peft.tools.plan.optimizers import optimizer_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_what_torch_holds(dtype):
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((8, 3), (40,))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert optimizer_bytes("adamw_torch", parameters) == held


def test_8_bit_states_by_hand():
    """4,097 weights: two states of a byte each with 17 fp32 scales each; fewer than 4,096: two fp32 states."""
    large, small = torch.empty(4097), torch.empty(64, 63)
    assert optimizer_bytes("adamw_8bit", [large]) - optimizer_bytes("adamw_8bit", []) == 2 * (4097 + 17 * 4)
    assert optimizer_bytes("adamw_8bit", [small]) - optimizer_bytes("adamw_8bit", []) == 2 * 4 * 64 * 63
    assert optimizer_bytes("paged_adamw_8bit", [large]) == optimizer_bytes("adamw_8bit", [large])
