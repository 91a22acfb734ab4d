"""Bytes over time, on code whose memory is known by hand."""

import pytest
import torch

from ordmoe_peft._compat import FakeTensorMode
from ordmoe_peft.tools.plan.trace import MemoryTrace, fake_of


def trace(at_hand=()):
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    return fakes, MemoryTrace(fakes, at_hand)


def test_live_and_peak():
    """x: 400 bytes; x + 1 and its product with 2 at once: 1200; the product alone stays."""
    fakes, memory = trace()
    with fakes, memory:
        x = torch.empty(100)
        assert memory.live == 400
        y = (x + 1) * 2
        assert (memory.live, memory.peak) == (800, 1200)
        view = y.view(10, 10).T
        assert memory.live == 800, "a view holds nothing of its own"
        del x, y
        assert memory.live == 400, "but it holds what it is a view of"
        del view
    assert memory.live == 0


def test_what_backward_needs_is_held():
    """exp keeps its result, and the chain's end is a scalar of 4 bytes."""
    weight = torch.nn.Parameter(torch.empty(100, device="meta"))
    fakes, memory = trace([weight])
    weight = torch.nn.Parameter(fake_of(weight, fakes))
    with fakes, memory:
        loss = weight.exp().sum()
        assert memory.live == 400 + 4
        loss.backward()
        del loss
    assert memory.live == 400, "the gradient"


def test_integers_are_real_and_floats_are_not():
    fakes, memory = trace()
    with fakes, memory:
        rows = torch.arange(6).view(2, 3)
        assert rows.sum(1).tolist() == [3, 12]
        x = torch.empty(8, 4)
        assert x[rows].shape == (2, 3, 4)
        assert x[torch.tensor([True, False] * 4)].shape == (4, 4), "a mask that is known selects a known number"


def test_choices_are_even_and_real():
    fakes, memory = trace()
    with fakes, memory:
        chosen = torch.empty(16, 8).topk(2, dim=-1).indices
        assert torch.bincount(chosen.reshape(-1), minlength=8).tolist() == [4] * 8
        assert all(len(set(row)) == 2 for row in chosen.tolist())


def test_views_of_weights_without_numbers_hold_nothing():
    packed = torch.empty(128, 1, device="meta", dtype=torch.uint8)
    fakes, memory = trace([packed])
    with fakes, memory:
        part = packed.reshape(-1).view(2, -1)[1]
    assert part.shape == (64,)
    assert memory.live == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_grouped_products_are_those_of_torch_in_every_dtype(dtype):
    """Shapes and dtypes, of a product and of both its gradients; torch's own rule for fake tensors is bf16's alone."""

    def run(make):
        left_NI, right_EIO = make(6, 8, dtype=dtype).requires_grad_(), make(3, 8, 16, dtype=dtype).requires_grad_()
        product_NO = torch.nn.functional.grouped_mm(left_NI, right_EIO, offs=torch.tensor([2, 2, 6], dtype=torch.int32))
        product_NO.square().sum().backward()
        return [(x.shape, x.dtype) for x in (product_NO, left_NI.grad, right_EIO.grad)]

    fakes, memory = trace()
    with fakes, memory:
        traced = run(torch.empty)
    assert traced == run(torch.ones)
