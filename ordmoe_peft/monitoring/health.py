"""What a router's choices say of its health: statistics of tokens, and what their sums mean for a layer.

Shape suffixes as in `experts/__init__.py`; C tiers, n columns of statistics.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


# An expert that is chosen less often than this share of its fair share K/E is dead: hundredfold too rare to be a
# matter of the sample once a layer has seen some ten thousand tokens.
DEAD_SHARE = 0.01


@dataclass(frozen=True)
class LayerHealth:
    """How a layer's router spreads its tokens.

    Entropies are in units of ln E, so 1 is uniform and 0 a single expert.

    Args:
        layer (`int`): place among the model's MoE layers, from 0.
        name (`str`): the module that holds router and experts.
        num_experts (`int`): E.
        top_k (`int`): K.
        num_tokens (`int`): tokens counted.
        utilisation (`list[float]`): tokens of each expert relative to the fair share K/E, so 1 is fair.
        dead (`int`): experts below [`DEAD_SHARE`] of the fair share.
        imbalance (`float`): load of the busiest expert over the mean load; from 1 to E/K.
        variation (`float`): coefficient of variation of the experts' loads.
        marginal_entropy (`float`): entropy of the mean router distribution; low where the router has collapsed.
        token_entropy (`float`): mean entropy of a token's router distribution; low where the router is confident.
        score_std (`float`): mean over tokens of the standard deviation of the E router logits; 0 for flat scores.
        gate_mass (`list[float]`): for each tier from 1, the mean over tokens of the sum of the weights that the router
            returns for the tier's K experts.
        tier_probability (`list[float]`): likewise, the softmax probability of the tier's experts.
        drift_overlap (`float`, *optional*): share of the K chosen experts that the router without its adapter chooses
            as well, given the same hidden states; `None` where no adapter is on the router.
        drift_kl (`float`, *optional*): KL(base ‖ adapted) of their softmax distributions, in nats.
    """

    layer: int
    name: str
    num_experts: int
    top_k: int
    num_tokens: int
    utilisation: list[float]
    dead: int
    imbalance: float
    variation: float
    marginal_entropy: float
    token_entropy: float
    score_std: float
    gate_mass: list[float]
    tier_probability: list[float]
    drift_overlap: float | None
    drift_kl: float | None


# ----------------------------------------------------------------------------------------- per token, on the device
def routing_columns(logits_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """One, the chosen experts, the router's probabilities, their entropy and the logits' standard deviation.

    Args:
        logits_TE (`torch.Tensor` of shape `(T, E)`): router logits.
        index_TK (`torch.Tensor` of shape `(T, K)`): chosen experts.

    Returns:
        `torch.Tensor` of shape `(T, 2·E + 3)`, float32.
    """
    logits_TE = logits_TE.float()
    probability_TE = logits_TE.softmax(-1)
    chosen_TE = torch.zeros_like(probability_TE).scatter(1, index_TK, 1.0)
    entropy_T1 = torch.special.entr(probability_TE).sum(-1, keepdim=True)
    deviation_T1 = logits_TE.std(-1, correction=0, keepdim=True)
    return torch.cat([torch.ones_like(entropy_T1), chosen_TE, probability_TE, entropy_T1, deviation_T1], dim=1)


def tier_columns(
    logits_TE: torch.Tensor, weights: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Gate mass of each tier, then softmax probability of each tier's experts (`torch.Tensor` of shape `(T, 2·C)`).

    Args:
        logits_TE (`torch.Tensor` of shape `(T, E)`): router logits.
        weights, indices (C `torch.Tensor` of shape `(T, K)`): weights and experts that the router gives under each.
    """
    probability_TE = logits_TE.float().softmax(-1)
    mass = [weights_TK.float().sum(-1) for weights_TK in weights]
    probability = [probability_TE.gather(1, index_TK).sum(-1) for index_TK in indices]
    return torch.stack([*mass, *probability], dim=1)


def drift_columns(
    logits_TE: torch.Tensor, index_TK: torch.Tensor, base_logits_TE: torch.Tensor, base_index_TK: torch.Tensor
) -> torch.Tensor:
    """Share of the base's K experts still chosen, and KL(base ‖ adapted) (`torch.Tensor` of shape `(T, 2)`)."""
    is_kept_TK = (base_index_TK.unsqueeze(2) == index_TK.unsqueeze(1)).any(2)
    log_probs_TE, base_log_probs_TE = logits_TE.float().log_softmax(-1), base_logits_TE.float().log_softmax(-1)
    kl_TE = torch.nn.functional.kl_div(log_probs_TE, base_log_probs_TE, log_target=True, reduction="none")
    return torch.stack([is_kept_TK.float().mean(1), kl_TE.sum(1)], dim=1)


# ------------------------------------------------------------------------------------------- per layer, on the host
def layer_health(
    layer: int, name: str, num_experts: int, top_k: int, num_tiers: int, has_drift: bool, sums: list[float]
) -> LayerHealth | None:
    """What the columns' sums over tokens say, in the order `routing`, `tier`, `drift`; `None` without any token.

    Args:
        layer (`int`), name (`str`), num_experts (`int`), top_k (`int`): the layer.
        num_tiers (`int`): C of the tier columns, 0 without these.
        has_drift (`bool`): whether there are drift columns.
        sums (`list[float]`): one sum per column.
    """
    num_tokens = round(sums[0])
    if num_tokens == 0:
        return None
    means = iter([value / num_tokens for value in sums[1:]])

    def take(count: int) -> list[float]:
        return [next(means) for _ in range(count)]

    utilisation = [share * num_experts / top_k for share in take(num_experts)]
    marginal_entropy = -sum(share * math.log(share) for share in take(num_experts) if share > 0)
    token_entropy, score_std = take(2)
    return LayerHealth(
        layer=layer,
        name=name,
        num_experts=num_experts,
        top_k=top_k,
        num_tokens=num_tokens,
        utilisation=utilisation,
        dead=sum(share < DEAD_SHARE for share in utilisation),
        imbalance=max(utilisation),
        variation=math.sqrt(sum((share - 1) ** 2 for share in utilisation) / num_experts),
        marginal_entropy=marginal_entropy / math.log(num_experts),
        token_entropy=token_entropy / math.log(num_experts),
        score_std=score_std,
        gate_mass=take(num_tiers),
        tier_probability=take(num_tiers),
        drift_overlap=next(means) if has_drift else None,
        drift_kl=next(means) if has_drift else None,
    )
