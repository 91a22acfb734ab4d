"""Sizes of optimizer states, and what of them does not exist yet."""

import pytest
import torch

from ordmoe_peft.training.optimizer_states import OPTIMIZERS, missing_bytes, optimizer_bytes


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
