"""The way of few rows against one token and one expert at a time, and how it orders rows."""

import pytest
import torch

from ordmoe_peft.experts import few_rows, forward
from ordmoe_peft.experts.few_rows import rows_by_expert
from tests import reference
from tests.experts.test_forward import (
    HIDDEN,
    LAYOUTS,
    ROUTINGS,
    build_experts,
    build_lora,
    experts_forward,
    factors,
    stacks_with_updates,
)


@pytest.mark.parametrize("by_row", [True, False], ids=["row by row", "by token"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_few_rows_of_a_forward_without_gradients(flags, routing, packed, by_row, monkeypatch):
    module = build_experts(**flags).eval()
    updates = {name: factors(*ab) for name, ab in build_lora(module).items()}
    stacks = stacks_with_updates(module, updates, {} if packed else None)
    index = torch.tensor(routing)
    x, weights = torch.randn(len(index), HIDDEN), torch.rand(index.shape)
    monkeypatch.setattr(forward, "FEW_ROWS", index.numel())
    monkeypatch.setattr(forward, "run_frozen_experts", None)  # not this way
    monkeypatch.setattr(few_rows, "ROWS_BY_ROW", 1000 if by_row else 0)
    with torch.no_grad():
        got = experts_forward(module, x, index, weights, expert_lora=updates)
        wanted = reference.experts(module, x, index, weights, stacks)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_rows_of_an_expert_lie_side_by_side(routing):
    index_TK = torch.tensor(routing)
    rows = rows_by_expert(index_TK)
    assert [e for e, count in rows.num_rows.items() for _ in range(count)] == rows.expert_N.tolist()
    assert torch.equal(rows.expert_N[rows.row_N], index_TK.reshape(-1))
    assert (rows.token_N[rows.row_N] == torch.arange(len(index_TK)).repeat_interleave(index_TK.shape[1])).all()
