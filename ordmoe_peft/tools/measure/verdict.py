"""Whether a model's routing can be cut into tiers that differ, and if not, why.

That is all: whether a higher tier is the better one takes answers to judge, see `ordmoe tiers`.
"""

import math

from ...moe_model import MoELayer
from ...monitoring.health import DEAD_SHARE, LayerHealth


# An expert that more than this share of all tokens choose is in tier 1 whatever the token: it says nothing of the
# token, acts as a shared expert, and is missing in every low tier. Where tiers fit at all, the fair share is at most a
# half.
ALWAYS_CHOSEN = 0.9
# Below this, in units of ln E, the mean router distribution spreads over fewer than √E experts: the rest of the
# ranking is between experts that the router hardly tells apart.
MIN_MARGINAL_ENTROPY = 0.5
# Tokens that dead experts would have had at the fair share, below which it may be chance that they got none: of the
# random routers of our tests, 2 experts of 96 missed all their 18.
MIN_MISSED = 20
# Logits that spread less than this rank experts by noise: from the mean to the best of 16 experts is some 1.8 standard
# deviations, so at 0.05 the best expert is only 9 % more probable than the mean; bf16 rounds logits near 4 by 0.016.
MIN_SCORE_STD = 0.05
# A tier whose weights sum to less than this share of tier 1's leaves the MoE layer all but silent, so its likelihood
# is that of skipping the layer rather than of its experts.
MIN_GATE_MASS = 0.2
NEXT_STEP = "Whether ranks carry a signal, so that higher tiers answer better, is not said by this: run `ordmoe tiers`."


def reasons_against(
    layers: list[LayerHealth],
    moe_layers: list[MoELayer],
    unsupported: dict[str, str],
    num_tiers: int,
    tier_weights: str = "router",
) -> list[str]:
    """What speaks against cutting the routing into `num_tiers` tiers, a sentence each.

    Args:
        layers (list of [`~ordmoe_peft.monitoring.health.LayerHealth`]): what was measured.
        moe_layers (list of [`~ordmoe_peft.moe_model.MoELayer`]): the model's layers.
        unsupported (`dict[str, str]`): layer name → why its router cannot be held to tiers.
        num_tiers (`int`): C.
        tier_weights (`str`, defaults to `"router"`): with `"match"`, low tiers weigh what tier 1 does, whatever their
            gate mass.
    """
    reasons = [
        f"Layer {layer.index}: {unsupported[layer.block_name]}"
        for layer in moe_layers
        if layer.block_name in unsupported
    ]
    measured = {layer.layer for layer in layers}
    reasons += [
        f"Layer {layer.index} ({layer.block_name}): no token reached its router."
        for layer in moe_layers
        if layer.index not in measured and layer.block_name not in unsupported
    ]
    for health in layers:
        found = _layer_reasons(health, num_tiers, tier_weights)
        reasons += [f"Layer {health.layer} ({health.name}): {reason}" for reason in found]
    return reasons


def _layer_reasons(layer: LayerHealth, num_tiers: int, tier_weights: str) -> list[str]:
    if not math.isfinite(layer.score_std):
        return ["its router logits are not finite."]
    collapse = [_always_chosen(layer), _low_entropy(layer)]
    checks = [
        _too_many_tiers(layer, num_tiers),
        *collapse,
        # Dead experts follow from a collapse, which is then the reason to name.
        None if any(collapse) else _dead_experts(layer, num_tiers),
        _flat_scores(layer),
        _low_gate_mass(layer) if tier_weights == "router" else None,
    ]
    return [reason for reason in checks if reason is not None]


def _too_many_tiers(layer: LayerHealth, num_tiers: int) -> str | None:
    needed, most = num_tiers * layer.top_k, layer.num_experts // layer.top_k
    if needed <= layer.num_experts:
        return None
    return (
        f"{num_tiers} tiers of {layer.top_k} experts need {needed}, but it has {layer.num_experts}; the largest "
        f"num_tiers that fits is {most}."
    )


def _always_chosen(layer: LayerHealth) -> str | None:
    shares = [use * layer.top_k / layer.num_experts for use in layer.utilisation]
    always = [f"expert {expert} {share:.0%}" for expert, share in enumerate(shares) if share > ALWAYS_CHOSEN]
    if not always:
        return None
    return f"its router has collapsed onto experts that nearly every token chooses ({', '.join(always)})."


def _low_entropy(layer: LayerHealth) -> str | None:
    if layer.marginal_entropy >= MIN_MARGINAL_ENTROPY:
        return None
    return (
        f"its router has collapsed: the entropy of its mean distribution is {layer.marginal_entropy:.2f} of "
        f"ln {layer.num_experts}, below {MIN_MARGINAL_ENTROPY}."
    )


def _dead_experts(layer: LayerHealth, num_tiers: int) -> str | None:
    if layer.dead * layer.num_tokens * layer.top_k / layer.num_experts < MIN_MISSED:
        return None
    alive, needed = layer.num_experts - layer.dead, num_tiers * layer.top_k
    is_short = alive < needed <= layer.num_experts
    short = f", which leaves {alive} for the {needed} places of {num_tiers} tiers"
    return (
        f"{layer.dead} of its {layer.num_experts} experts are dead (below {DEAD_SHARE:.0%} of the fair share on "
        f"{layer.num_tokens:,} tokens){short if is_short else ', and low tiers may consist of them'}."
    )


def _flat_scores(layer: LayerHealth) -> str | None:
    if layer.score_std >= MIN_SCORE_STD:
        return None
    return (
        f"its scores are flat: a token's router logits have a standard deviation of {layer.score_std:.2g}, below "
        f"{MIN_SCORE_STD}, so ranks are noise."
    )


def _low_gate_mass(layer: LayerHealth) -> str | None:
    low = [
        f"tier {tier} {mass:.3f}"
        for tier, mass in enumerate(layer.gate_mass, start=1)
        if mass < MIN_GATE_MASS * layer.gate_mass[0]
    ]
    if not low:
        return None
    return (
        f"its router gives low tiers almost no weight ({', '.join(low)}; tier 1 {layer.gate_mass[0]:.3f}), because it "
        "does not renormalise the weights of the chosen experts: set tier_weights='match'."
    )
