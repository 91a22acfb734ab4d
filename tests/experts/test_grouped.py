"""Grouped products against one product per expert, in values and all gradients, on non-square sizes."""

import pytest
import torch

from ordmoe_peft.experts.grouped import grouped_lora, grouped_matmul


# Blocks of 5 experts: two of them empty, all rows on one, a single row.
ENDS = {"empty experts": [3, 3, 10, 13, 13], "one expert": [0, 0, 13, 13, 13], "one row": [0, 1, 1, 1, 1]}
# Sizes that torch's grouped_mm accepts, and sizes that it refuses.
SIZES = {"aligned": (24, 40), "unaligned": (7, 9)}


def reference(x_NI, weight_EIO, ends):
    starts = [0, *ends[:-1]]
    return torch.cat([x_NI[a:b] @ weight_EIO[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True))])


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
    A = torch.randn(5, r, in_features, requires_grad=True)
    B = torch.randn(5, out_features, r, requires_grad=True)
    check(
        lambda: grouped_lora(x, A, B, 0.7, torch.tensor(ends, dtype=torch.int32)),
        lambda: reference(x, 0.7 * (B @ A).transpose(1, 2), ends),
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
