"""Preference losses over ordered tiers: column 1 is the response that should win, column C the one that should lose.

Each maps likelihoods of shape (B, C), C ≥ 2, to the mean loss of the batch, in float32 or better. Means are L̄, the
mean log-probability per response token; sums are L, the log-probability of the whole response.
"""

import torch
from torch.nn.functional import logsigmoid


def logistic_loss(log_likelihood_BC: torch.Tensor, beta: float) -> torch.Tensor:
    """`−log σ(β(L̄_1 − L̄_C))`: tier 1 against the lowest tier, the tiers between play no part.

    The Bradley-Terry model of one comparison (Bradley and Terry, Biometrika 39, 1952), as a loss RankNet's (Burges et
    al., ICML 2005, eq. 3 with a target of 1).

    Args:
        log_likelihood_BC (`torch.Tensor` of shape `(B, C)`): means L̄, in nats per token.
        beta (`float`): β, per nat; the larger, the sooner a pair in order stops pulling.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    scores_BC = _scores(log_likelihood_BC)
    return -logsigmoid(beta * (scores_BC[:, 0] - scores_BC[:, -1])).mean()


def plackett_luce_loss(log_likelihood_BC: torch.Tensor, beta: float) -> torch.Tensor:
    """`−Σ_j [βL̄_j − log Σ_{k≥j} exp(βL̄_k)]`: minus the log-probability of the whole order, tier 1 drawn first.

    The model is Luce's (Individual Choice Behavior, 1959) and Plackett's (Applied Statistics 24, 1975); as a listwise
    loss it is ListMLE (Xia et al., ICML 2008). With two tiers it is [`logistic_loss`].

    Args:
        log_likelihood_BC (`torch.Tensor` of shape `(B, C)`): means L̄, in nats per token.
        beta (`float`): β, per nat.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    scores_BC = beta * _scores(log_likelihood_BC)
    remaining = [scores_BC[:, tier:].logsumexp(-1) for tier in range(scores_BC.shape[1])]
    return (torch.stack(remaining, dim=-1) - scores_BC).sum(-1).mean()


def dpo_loss(log_likelihood_BC: torch.Tensor, reference_BC: torch.Tensor, beta: float) -> torch.Tensor:
    """`−log σ(β[(L_j − L_j^ref) − (L_k − L_k^ref)])`, the mean over all pairs of tiers j < k (arXiv 2305.18290, eq. 7).

    Args:
        log_likelihood_BC (`torch.Tensor` of shape `(B, C)`): sums L over the response's tokens, in nats; not means.
        reference_BC (`torch.Tensor` of shape `(B, C)`): the same under the frozen base, scored in the same way.
        beta (`float`): β, per nat; the larger, the closer the optimum stays to the base.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    margins_BP = _pair_margins(_scores(log_likelihood_BC) - _scores(reference_BC))
    return -logsigmoid(beta * margins_BP).mean()


def ipo_loss(log_likelihood_BC: torch.Tensor, reference_BC: torch.Tensor, beta: float) -> torch.Tensor:
    """`([(L̄_j − L̄_j^ref) − (L̄_k − L̄_k^ref)] − 1/(2β))²`, the mean over all pairs of tiers j < k.

    Source: arXiv 2310.12036, eq. 17, whose τ is β. It writes log-probabilities of whole responses; they are means
    here, as in TRL's `loss_type="ipo"`, so that the target margin 1/(2β) does not depend on the length. Unlike
    the other losses it is minimal at a finite margin, and pulls back beyond it.

    Args:
        log_likelihood_BC (`torch.Tensor` of shape `(B, C)`): means L̄, in nats per token.
        reference_BC (`torch.Tensor` of shape `(B, C)`): the same under the frozen base, scored in the same way.
        beta (`float`): β, per nat; not 0. The margin aimed at is 1/(2β) nats per token.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    margins_BP = _pair_margins(_scores(log_likelihood_BC) - _scores(reference_BC))
    return (margins_BP - 1 / (2 * beta)).square().mean()


def simpo_loss(log_likelihood_BC: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """`−log σ(β(L̄_j − L̄_k) − γ)`, the mean over all pairs of tiers j < k (SimPO, arXiv 2405.14734, eq. 6).

    γ is the paper's, a margin of rewards βL̄, and so is TRL's `simpo_gamma`: its `CPOTrainer` subtracts γ/β before it
    multiplies by β. It is not the ratio γ/β that the authors' own code takes as `gamma_beta_ratio`.

    Args:
        log_likelihood_BC (`torch.Tensor` of shape `(B, C)`): means L̄, in nats per token.
        beta (`float`): β, per nat.
        gamma (`float`): γ ≥ 0, no unit: the loss is log 2 where L̄_j leads by γ/β nats per token.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return -logsigmoid(beta * _pair_margins(_scores(log_likelihood_BC)) - gamma).mean()


def _scores(log_likelihood_BC: torch.Tensor) -> torch.Tensor:
    assert log_likelihood_BC.ndim == 2 and log_likelihood_BC.shape[1] >= 2, "an order needs two tiers or more"
    return log_likelihood_BC.to(torch.promote_types(log_likelihood_BC.dtype, torch.float32))


def _pair_margins(scores_BC: torch.Tensor) -> torch.Tensor:
    """`score_j − score_k` of the P = C(C−1)/2 pairs of tiers j < k (`torch.Tensor` of shape `(B, P)`)."""
    num_tiers = scores_BC.shape[1]
    higher_P, lower_P = torch.triu_indices(num_tiers, num_tiers, offset=1, device=scores_BC.device)
    return scores_BC[:, higher_P] - scores_BC[:, lower_P]
