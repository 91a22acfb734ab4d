"""The way of few rows on GPUs, against one token and one expert at a time."""

import pytest
import torch

from ordmoe_peft.experts import forward
from ordmoe_peft.experts.tuning import WorkSizes, on_gpu
from tests import reference
from tests.experts.test_forward import (
    HIDDEN,
    LAYOUTS,
    PACKINGS,
    ROUTINGS,
    build_experts,
    build_lora,
    experts_forward,
    factors,
    stacks_with_updates,
)


@pytest.mark.parametrize("packed", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_with_a_matrix_each(flags, routing, packed, monkeypatch):
    module = build_experts(**flags).eval()
    updates = {name: factors(*ab) for name, ab in build_lora(module).items()}
    stacks = stacks_with_updates(module, updates, packed)
    index = torch.tensor(routing)
    x, weights = torch.randn(len(index), HIDDEN), torch.rand(index.shape)
    monkeypatch.setattr(forward, "work_sizes", lambda device: on_gpu())
    monkeypatch.setattr(forward, "run_frozen_experts", None)  # not this way
    with torch.no_grad():
        got = experts_forward(module, x, index, weights, expert_lora=updates)
        wanted = reference.experts(module, x, index, weights, stacks)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_rows_whose_matrices_do_not_fit_the_budget_go_through_blocks(monkeypatch):
    module = build_experts().eval()
    updates = {name: factors(*ab) for name, ab in build_lora(module).items()}
    index, x, weights = torch.tensor([[0, 1], [1, 2]]), torch.randn(2, HIDDEN), torch.rand(2, 2)
    matrix = 4 * module.gate_up_proj[0].numel()
    ways = []
    for name in ("run_frozen_experts", "run_row_by_row"):
        run = getattr(forward, name)
        monkeypatch.setattr(forward, name, lambda *args, run=run, name=name: ways.append(name) or run(*args))
    outputs = []
    for rows in (1, 4):
        sizes = WorkSizes(slots=1000, bin_cost=1000, row_step=8, matrices=rows * matrix)
        monkeypatch.setattr(forward, "work_sizes", lambda device, sizes=sizes: sizes)
        with torch.no_grad():
            outputs.append(experts_forward(module, x, index, weights, expert_lora=updates))
        with torch.no_grad():
            experts_forward(module, x[:1], index[:1], weights[:1], expert_lora=updates)
    assert ways == ["run_frozen_experts", "run_row_by_row", "run_row_by_row", "run_row_by_row"], "one token always does"
    torch.testing.assert_close(*outputs)
