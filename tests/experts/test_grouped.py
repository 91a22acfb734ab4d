"""Grouped products against one product per expert, in values and all gradients, on non-square sizes."""

import pytest
import torch

from ordmoe_peft.experts.frozen import LowRank
from ordmoe_peft.experts.grouped import combine_by_token, grouped_lora, grouped_matmul
from ordmoe_peft.experts.layout import group_by_expert
from tests.reference import expert_deltas


# Blocks of 5 experts: two of them empty, all rows on one, a single row.
ENDS = {"empty experts": [3, 3, 10, 13, 13], "one expert": [0, 0, 13, 13, 13], "one row": [0, 1, 1, 1, 1]}
ROUTINGS = {
    "mixed": [[2, 0], [0, 3], [2, 3]],
    "one token": [[1, 4]],
    "all on one expert": [[3], [3], [3]],
}
# Sizes that torch's grouped_mm accepts, and sizes that it refuses.
SIZES = {"aligned": (24, 40), "unaligned": (7, 9)}


def reference(x_NI, weight_EIO, ends):
    starts = [0, *ends[:-1]]
    return torch.cat([x_NI[a:b] @ weight_EIO[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True))])


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_each_block_holds_the_rows_of_its_expert(routing):
    index_TK = torch.tensor(routing)
    order_N, _, ends_E = group_by_expert(index_TK, num_experts=5)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        rows = order_N[start:end]
        assert (index_TK.reshape(-1)[rows] == expert).all()
        start = end
    assert sorted(order_N.tolist()) == list(range(index_TK.numel()))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_combine_sums_the_rows_of_each_token(routing):
    index_TK = torch.tensor(routing)
    order_N, _, _ = group_by_expert(index_TK, num_experts=5)
    rows_NH = torch.randn(index_TK.numel(), 6)
    expected = torch.zeros(len(index_TK), 6)
    for place, token in enumerate((order_N // index_TK.shape[1]).tolist()):
        expected[token] += rows_NH[place]
    torch.testing.assert_close(combine_by_token(rows_NH, order_N, index_TK.shape[1]), expected)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_matmul(ends, sizes):
    x = torch.randn(ends[-1], sizes[0], requires_grad=True)
    weight = torch.randn(5, *sizes, requires_grad=True)
    check(
        lambda: grouped_matmul(x, weight, torch.tensor(ends, dtype=torch.int32)),
        lambda: reference(x, weight, ends),
        x,
        weight,
    )


@pytest.mark.parametrize("r", [1, 3, 4, 8])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_lora(r, sizes):
    ends = ENDS["empty experts"]
    in_features, out_features = sizes
    x = torch.randn(ends[-1], in_features, requires_grad=True)
    A = torch.randn(5 * r, in_features, requires_grad=True)
    B = torch.randn(out_features, r * 5, requires_grad=True)
    check(
        lambda: grouped_lora(x, LowRank(A, B, 5, 0.7), torch.tensor(ends, dtype=torch.int32)),
        lambda: reference(x, expert_deltas(A, B, 5, 0.7).transpose(1, 2), ends),
        x,
        A,
        B,
    )


def check(computed, expected, *inputs):
    """Same value, and same gradients of a random projection of it."""
    value, truth = computed(), expected()
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(truth)
    for got, wanted in zip(
        torch.autograd.grad(value, inputs, direction), torch.autograd.grad(truth, inputs, direction), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
