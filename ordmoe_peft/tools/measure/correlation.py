"""Does the router's confidence in the experts that it chose go with the quality of the response?

Shape suffixes as in `experts/__init__.py`; n counts samples, L MoE layers.
"""

import math
from dataclasses import dataclass

import torch

from ...objectives.expert_rank import mean_log_likelihood


@dataclass
class RankCorrelation:
    """Spearman's ρ between routing scores and quality.

    Args:
        overall (`float`, *optional*): of the routing scores' mean over layers; `None` where it is not defined.
        layers (`list`): of each MoE layer's routing scores, likewise.
        stderr (`float`, *optional*): standard error of a ρ of 0 over as many independent pairs, 1/√(n − 1).
    """

    overall: float | None
    layers: list[float | None]
    stderr: float | None


def routing_score(
    router_logits_TE: torch.Tensor, top_k_index_TK: torch.Tensor, predicts_BS: torch.Tensor
) -> torch.Tensor:
    """How probable a layer's router held the experts that each sample's response came from (`(B,)`, in nats).

    At a position, that is the mean over the K chosen experts of the router's log-probability: the log-softmax of its
    logits over all E experts, whatever rule the router itself makes weights by. A sample's routing score is the mean
    over the positions that predict a response token, from the last prompt token to the last response token but one.

    Args:
        router_logits_TE (`torch.Tensor` of shape `(T, E)`): logits of all T = B·S positions, rows after one another.
        top_k_index_TK (`torch.Tensor` of shape `(T, K)`): the experts that were chosen, by whatever tier.
        predicts_BS (`torch.Tensor` of shape `(B, S)`): positions that predict a response token.
    """
    log_probs_TE = router_logits_TE.float().log_softmax(-1)
    chosen_T = log_probs_TE.gather(1, top_k_index_TK.to(log_probs_TE.device)).mean(1)
    predicts_BS = predicts_BS.to(chosen_T.device)
    return mean_log_likelihood(chosen_T.view_as(predicts_BS), predicts_BS)


def average_ranks(values_n: torch.Tensor) -> torch.Tensor:
    """Ranks from 1, equal values sharing the mean of theirs (`torch.Tensor` of shape `(n,)`, float64)."""
    # u counts distinct values, in rising order. Equal values take the ranks up to the sum of the counts so far.
    _, distinct_n, counts_u = torch.unique(values_n, return_inverse=True, return_counts=True)
    mean_rank_u = counts_u.cumsum(0) - (counts_u.double() - 1) / 2
    return mean_rank_u[distinct_n]


def spearman(x_n: torch.Tensor, y_n: torch.Tensor) -> float | None:
    """Spearman's ρ: Pearson's correlation of average ranks. `None` where either side is constant."""
    x_n, y_n = (average_ranks(values) - (len(values) + 1) / 2 for values in (x_n, y_n))
    norm = x_n.norm() * y_n.norm()
    return (x_n @ y_n / norm).item() if norm > 0 else None


def rank_correlation(routing_scores_nL: torch.Tensor, quality_n: torch.Tensor) -> RankCorrelation:
    """Spearman's ρ between `quality_n` and the routing scores, per layer and of their mean over layers."""
    count = len(quality_n)
    return RankCorrelation(
        overall=spearman(routing_scores_nL.mean(1), quality_n),
        layers=[spearman(scores_n, quality_n) for scores_n in routing_scores_nL.T],
        stderr=1 / math.sqrt(count - 1) if count > 1 else None,
    )
