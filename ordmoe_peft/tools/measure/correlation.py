"""Does the router's confidence in the experts that it chose go with the quality of the response?

Shape suffixes as in `experts/__init__.py`; n counts samples, L MoE layers.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import OrdMoEDataError
from ...objectives.expert_rank import mean_log_likelihood
from .evaluation import TierResult


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


@dataclass
class QualityCorrelation:
    """Spearman's ρ between routing scores and quality, [`routing_score`].

    Args:
        within_top (`RankCorrelation`): over samples, under tier 1.
        pooled (`RankCorrelation`): over pairs of sample and tier, quality and routing score of the same tier. Lower
            tiers have lower routing scores by construction, so this mostly restates their order.
        quality (`str`): what quality was.
        note (`str`, *optional*): why it was that, or why a value is missing.
    """

    within_top: RankCorrelation
    pooled: RankCorrelation
    quality: str
    note: str | None


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


def quality_correlation(
    results: list[TierResult], routing_scores: list[torch.Tensor], ratings_n: torch.Tensor | None
) -> QualityCorrelation:
    """Compare routing scores with the quality of what came out.

    Args:
        results (`list[TierResult]`): from tier 1 to tier C.
        routing_scores (list of `torch.Tensor` of shape `(n, L)`): of the same tiers.
        ratings_n (`torch.Tensor` of shape `(n,)`, *optional*): ratings that stand in for exact match.
    """
    quality, notes = "exact match", []
    quality_Cn = torch.tensor([result.items.is_right for result in results]).double()
    log_likelihood_Cn = torch.tensor([result.items.log_likelihood for result in results])
    if ratings_n is not None:
        quality, quality_Cn = "rating", ratings_n.unsqueeze(0)
        notes.append("A rating belongs to one response per sample, so tiers are not pooled.")
    elif not results[0].items.answers:
        quality, quality_Cn = "mean log-likelihood", log_likelihood_Cn
        notes.append("Nothing was generated, so quality is the likelihood of the text.")
    elif is_constant(quality_Cn[0]):
        quality, answers = "mean log-likelihood", "All" if quality_Cn[0, 0] else "None"
        notes.append(f"{answers} of tier 1's answers match, so quality is the likelihood of the reference.")
        quality_Cn = log_likelihood_Cn
    if is_constant(quality_Cn[0]):
        notes.append(f"The {quality} is {quality_Cn[0, 0]:g} for every sample, so nothing can go with it.")
    flat = [layer for layer, scores_n in enumerate(routing_scores[0].T) if is_constant(scores_n)]
    if flat:
        notes.append(f"Routing scores are the same for every sample in MoE layers {flat}.")
    within_top = rank_correlation(routing_scores[0], quality_Cn[0])
    pooled = RankCorrelation(None, [None] * len(within_top.layers), None)
    if ratings_n is None:
        pooled = rank_correlation(torch.cat(routing_scores), quality_Cn.reshape(-1))
        # Pairs of one sample are not independent, so no standard error applies.
        pooled.stderr = None
    return QualityCorrelation(within_top, pooled, quality, " ".join(notes) or None)


def is_constant(values_n: torch.Tensor) -> bool:
    return bool((values_n == values_n[0]).all())


def sample_ratings(dataset: Any, column: str) -> torch.Tensor:
    """The numbers in `column` (`torch.Tensor` of shape `(n,)`, float64).

    Raises:
        [`OrdMoEDataError`]: there is no such column, or something else than finite numbers in it.
    """
    if column not in dataset.column_names:
        raise OrdMoEDataError(f"rating_column={column!r} is not a column; there are {sorted(dataset.column_names)}.")
    ratings = list(dataset[column])
    for row, rating in enumerate(ratings):
        if not isinstance(rating, int | float) or not math.isfinite(rating):
            raise OrdMoEDataError(
                f"rating_column={column!r} needs a finite number in each row; row {row} has {rating!r}."
            )
    return torch.tensor(ratings, dtype=torch.float64)
