"""The way of few rows on GPUs, against one token and one expert at a time."""

import pytest
import torch

from ordmoe_peft.experts import forward
from ordmoe_peft.experts.tuning import WorkSizes, on_gpu
from ordmoe_peft.quantization.storage import dense_stack, pack_experts
from tests import reference
from tests.experts.test_forward import (
    HIDDEN,
    LAYOUTS,
    NUM_EXPERTS,
    PACKINGS,
    ROUTINGS,
    build_experts,
    build_lora,
    experts_forward,
    factors,
)


@pytest.mark.parametrize("packed", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_with_a_matrix_each(flags, routing, packed, monkeypatch):
    module = build_experts(**flags).eval()
    updates = {name: factors(*ab) for name, ab in build_lora(module).items()}
    dense = {name: getattr(module, name) for name in updates}
    if packed:
        for name, weight in dense.items():
            setattr(module, name, pack_experts(weight.data, name, **packed))
            dense[name] = dense_stack(getattr(module, name), torch.float32)
    index = torch.tensor(routing)
    x, weights = torch.randn(len(index), HIDDEN), torch.rand(index.shape)
    deltas = {name: reference.expert_deltas(a.A, a.B, NUM_EXPERTS, 0.5) for name, [a] in updates.items()}
    stacks = {
        name: dense[name] + (delta.transpose(1, 2) if module.is_transposed else delta) for name, delta in deltas.items()
    }
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
