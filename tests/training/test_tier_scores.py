"""Scores of single tiers as tensors over all tiers."""

import torch

from ordmoe_peft.training.tier_scores import SFT_ROWS, TierScores


def scored(value, width=2):
    return torch.full((1, width), value, requires_grad=True), torch.ones(1, width, dtype=torch.long)


def test_tiers_that_were_not_run_have_zeros_and_no_labels():
    scores = TierScores(3, 3, {SFT_ROWS: scored(-9.0), 1: scored(-1.0), 3: scored(-3.0, width=3)})
    assert scores.tiers == [1, 3]
    assert scores.log_probs_CBS.tolist() == [[[-1, -1, 0]], [[0, 0, 0]], [[-3, -3, -3]]]
    assert scores.mask_CBS.tolist() == [[[True, True, False]], [[False] * 3], [[True] * 3]]
    assert scores.reference_CBS is None


def test_numbers_alone():
    scores = TierScores(1, 2, {1: scored(-1.0)}, ntp_loss=torch.ones((), requires_grad=True))
    assert scores.log_probs_CBS.requires_grad
    detached = scores.detached()
    assert not detached.log_probs_CBS.requires_grad and not detached.ntp_loss.requires_grad
    assert torch.equal(detached.log_probs_CBS, scores.log_probs_CBS)
