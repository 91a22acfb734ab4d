"""Sizes of optimizer states."""

import pytest
import torch

from ordmoe_peft.tools.plan.optimizers import OPTIMIZERS, optimizer_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_what_torch_holds(dtype):
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((8, 3), (40,))]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert optimizer_bytes("adamw_torch_fused", parameters) == optimizer_bytes("adamw_torch", parameters) == held


def test_8_bit_states_by_hand():
    """4,097 weights: two states of a byte each with 17 fp32 scales each; fewer than 4,096: two fp32 states.

    All share two tables of 256 fp32 numbers.
    """
    large, small = torch.empty(4097), torch.empty(64, 63)
    of_large, of_small, tables = 2 * (4097 + 17 * 4), 2 * 4 * 64 * 63, 2 * 256 * 4
    assert optimizer_bytes("adamw_8bit", [large, large, small]) == 2 * of_large + of_small + tables
    assert optimizer_bytes("adamw_8bit", [small]) == of_small
    assert optimizer_bytes("paged_adamw_8bit", [large]) == optimizer_bytes("adamw_bnb_8bit", [large])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_given_stays_as_it_is(name):
    parameter = torch.nn.Parameter(torch.ones(8, 8, device="meta"))
    assert optimizer_bytes(name, [parameter]) == (0 if name == "sgd" else pytest.approx(2 * parameter.nbytes, abs=4))
    assert parameter.grad is None
