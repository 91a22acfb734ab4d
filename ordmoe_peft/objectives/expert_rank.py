"""The expert-rank loss: raise the likelihood of the response under high tiers, lower it under low ones."""

import math

import torch


def label_log_probs(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label, in float32 (`torch.Tensor` of shape `(B, S)`); any number where it is negative.

    Row by row: all rows' logits in float32 at once may be more than the model itself.
    """
    rows = zip(logits_BSV, labels_BS.clamp(min=0).unsqueeze(-1), strict=True)
    return torch.stack([row.float().log_softmax(-1).gather(-1, label).squeeze(-1) for row, label in rows])


def mean_log_likelihood(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean log-probability per token where `mask` holds, L̄ (`torch.Tensor` of shape `(...,)` from `(..., S)`).

    A row without any such token has mean 0.
    """
    return (log_probs * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def expert_rank_loss(mean_log_likelihood_BC: torch.Tensor, advantages_C: torch.Tensor) -> torch.Tensor:
    """`L_ERL = −(1/B) Σ_b Σ_j A_j · L̄_{b,j}` (OrdMoE, arXiv 2511.19023): a policy gradient with fixed rewards.

    It is linear in each L̄, and a negative advantage pushes its tier down without bound; see
    [`floor_lower_tiers`].
    """
    return -(mean_log_likelihood_BC * advantages_C).sum(-1).mean()


def log_floor(floor: float | str, vocab_size: int) -> float:
    """`lower_tier_floor` as a log-probability: `"uniform"` is that of a uniform guess, −ln V."""
    return -math.log(vocab_size) if floor == "uniform" else float(floor)


def floor_lower_tiers(log_probs_CBS: torch.Tensor, advantages_C: torch.Tensor, floor: float) -> torch.Tensor:
    """Stop the gradient of tokens whose log-probability under a tier of negative advantage is below `floor`.

    Values do not change; what is already improbable is just not pushed further down.
    """
    is_done = (advantages_C < 0).view(-1, 1, 1) & (log_probs_CBS < floor)
    return torch.where(is_done, log_probs_CBS.detach(), log_probs_CBS)
