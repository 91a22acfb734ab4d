"""What a router's choices say of its health: statistics of tokens, and what their sums mean for a layer.

Statistics of tokens are columns by name, each a `torch.Tensor` of shape `(T, width)`. Shape suffixes as in
`experts/__init__.py`; C tiers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


# An expert that is chosen less often than this share of its fair share K/E is dead: a hundred times too rare to be
# chance once a layer has seen some ten thousand tokens.
DEAD_SHARE = 0.01


@dataclass(frozen=True)
class LayerHealth:
    """How a layer's router spreads its tokens.

    Entropies are in units of ln E, so 1 is uniform and 0 a single expert.

    Args:
        layer (`int`): index among the model's MoE layers, from 0.
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
def column_widths(num_experts: int, num_tiers: int, has_drift: bool) -> dict[str, int]:
    """The columns of a layer in their order; without tiers (0) or drift, without these."""
    own = {"tokens": 1, "chosen": num_experts, "probability": num_experts, "token_entropy": 1, "score_std": 1}
    tiers = {"gate_mass": num_tiers, "tier_probability": num_tiers} if num_tiers else {}
    return own | tiers | ({"drift_overlap": 1, "drift_kl": 1} if has_drift else {})


def routing_columns(logits_TE: torch.Tensor, index_TK: torch.Tensor) -> dict[str, torch.Tensor]:
    """One, the chosen experts, the router's probabilities, their entropy and the logits' standard deviation.

    Args:
        logits_TE (`torch.Tensor` of shape `(T, E)`): router logits.
        index_TK (`torch.Tensor` of shape `(T, K)`): chosen experts.
    """
    logits_TE = logits_TE.float()
    probability_TE = logits_TE.softmax(-1)
    entropy_T1 = torch.special.entr(probability_TE).sum(-1, keepdim=True)
    return {
        "tokens": torch.ones_like(entropy_T1),
        "chosen": torch.zeros_like(probability_TE).scatter(1, index_TK, 1.0),
        "probability": probability_TE,
        "token_entropy": entropy_T1,
        "score_std": logits_TE.std(-1, correction=0, keepdim=True),
    }


def tier_columns(
    logits_TE: torch.Tensor, weights: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sum of the router's weights for each tier, and softmax probability of each tier's experts.

    Args:
        logits_TE (`torch.Tensor` of shape `(T, E)`): router logits.
        weights, indices (C `torch.Tensor` of shape `(T, K)`): weights and experts that the router gives under each.
    """
    probability_TE = logits_TE.float().softmax(-1)
    return {
        "gate_mass": torch.stack([weights_TK.float().sum(-1) for weights_TK in weights], dim=1),
        "tier_probability": torch.stack([probability_TE.gather(1, index_TK).sum(-1) for index_TK in indices], dim=1),
    }


def drift_columns(
    logits_TE: torch.Tensor, index_TK: torch.Tensor, base_logits_TE: torch.Tensor, base_index_TK: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Share of the base's K experts still chosen, and KL(base ‖ adapted)."""
    is_kept_TK = (base_index_TK.unsqueeze(2) == index_TK.unsqueeze(1)).any(2)
    log_probs_TE, base_log_probs_TE = logits_TE.float().log_softmax(-1), base_logits_TE.float().log_softmax(-1)
    kl_TE = torch.nn.functional.kl_div(log_probs_TE, base_log_probs_TE, log_target=True, reduction="none")
    return {
        "drift_overlap": is_kept_TK.float().mean(1, keepdim=True),
        "drift_kl": kl_TE.sum(1, keepdim=True),
    }


# ------------------------------------------------------------------------------------------- per layer, on the host
def layer_health(
    layer: int, name: str, num_experts: int, top_k: int, sums: Mapping[str, Sequence[float]]
) -> LayerHealth | None:
    """What the sums of the columns over tokens say of a layer; `None` without any token."""
    num_tokens = round(sums["tokens"][0])
    if num_tokens == 0:
        return None
    means = {column: [value / num_tokens for value in values] for column, values in sums.items()}
    utilisation = [share * num_experts / top_k for share in means["chosen"]]
    marginal_entropy = -sum(share * math.log(share) for share in means["probability"] if share > 0)
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
        token_entropy=means["token_entropy"][0] / math.log(num_experts),
        score_std=means["score_std"][0],
        gate_mass=means.get("gate_mass", []),
        tier_probability=means.get("tier_probability", []),
        drift_overlap=means.get("drift_overlap", [None])[0],
        drift_kl=means.get("drift_kl", [None])[0],
    )
