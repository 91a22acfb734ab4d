import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ordmoe_peft.objectives.balance import balance_loss
from tests import reference


def test_uniform_routing_costs_one():
    """Each of 4 experts gets one of 4 tokens, with mean probability ¼: 4 · Σ ¼ · ¼ = 1."""
    logits = torch.eye(4)
    assert balance_loss(logits, torch.arange(4)[:, None], torch.ones(4)).item() == pytest.approx(1.0)


def test_collapsed_routing_costs_the_number_of_experts():
    """All tokens on expert 0 with probability 1: 4 · 1 · 1 = 4."""
    logits = torch.tensor([[100.0, 0, 0, 0]] * 3)
    assert balance_loss(logits, torch.zeros(3, 1, dtype=torch.long), torch.ones(3)).item() == pytest.approx(4.0)


def test_against_the_reference_with_padding_and_gradients():
    logits = torch.randn(9, 6, requires_grad=True)
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 1])
    index = torch.rand(9, 6).topk(2).indices  # whatever the router chose
    value, truth = balance_loss(logits, index, mask), reference.balance_loss(logits, index, mask)
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (value, truth)))
    assert (torch.autograd.grad(balance_loss(logits, index, mask), logits)[0][mask == 0] == 0).all()


def test_is_transformers_loss_over_k():
    logits = torch.randn(10, 6)
    upstream = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    torch.testing.assert_close(balance_loss(logits, logits.topk(2).indices, torch.ones(10)), upstream / 2)
