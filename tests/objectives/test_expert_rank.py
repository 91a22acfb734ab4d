import math

import pytest
import torch

from ordmoe_peft.objectives.expert_rank import (
    expert_rank_loss,
    floor_lower_tiers,
    log_floor,
    mean_log_likelihood,
)


def test_mean_log_likelihood_counts_only_masked_tokens():
    """Row 1: (−1 − 3) / 2 = −2. Row 2: −5 / 1. Row 3 has no token."""
    log_probs = torch.tensor([[-1.0, -3.0, -9.0], [-5.0, -9.0, -9.0], [-9.0, -9.0, -9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert mean_log_likelihood(log_probs, mask).tolist() == [-2.0, -5.0, 0.0]


def test_expert_rank_loss():
    """Sample 1: 1·(−1) + 0·(−2) + (−1)·(−4) = 3. Sample 2: −2 + 6 = 4. Mean 3.5, and the loss is its negative."""
    likelihood = torch.tensor([[-1.0, -2.0, -4.0], [-2.0, -3.0, -6.0]])
    assert expert_rank_loss(likelihood, torch.tensor([1.0, 0.0, -1.0])).item() == -3.5


def test_expert_rank_loss_raises_the_top_and_lowers_the_bottom():
    """d(−(1/B) Σ A_j L̄_bj)/dL̄_bj = −A_j / B."""
    likelihood = torch.zeros(2, 3, requires_grad=True)
    expert_rank_loss(likelihood, torch.tensor([1.0, 0.0, -1.0])).backward()
    assert likelihood.grad.tolist() == [[-0.5, 0.0, 0.5], [-0.5, 0.0, 0.5]]


def test_floor_stops_the_gradient_of_improbable_tokens_in_negative_tiers():
    """Below −3, the token of the last tier gives no gradient; the same value in the first tier does."""
    log_probs = torch.tensor([[[-1.0, -4.0]], [[-1.0, -4.0]]], requires_grad=True)
    floored = floor_lower_tiers(log_probs, torch.tensor([1.0, -1.0]), floor=-3.0)
    assert torch.equal(floored, log_probs)
    floored.sum().backward()
    assert log_probs.grad.tolist() == [[[1.0, 1.0]], [[1.0, 0.0]]]


def test_uniform_floor_is_that_of_a_uniform_guess():
    assert log_floor("uniform", 100) == pytest.approx(-math.log(100))
    assert log_floor(-2.5, 100) == -2.5
