"""What the figures of tier quality say, in sentences, with the failure signatures named."""

import math
from itertools import pairwise

from .quality import OrderShare, TierQuality


# A difference is one when it is larger than this many standard errors.
CLEAR = 2
# Mean cosine from which a tier's experts are called alike.
ALIKE = 0.9


def read_quality(quality: TierQuality) -> list[str]:
    """The plain reading of `quality`, a sentence or two a point."""
    return [
        _read_ends(quality),
        *_read_full_order(quality),
        *_read_means(quality),
        _read_answers(quality),
        _read_correlation(quality),
        *_read_diversity(quality),
    ]


def is_above(share: OrderShare, level: float, level_stderr: float = 0.0) -> bool:
    """Whether the share is above `level` by more than noise."""
    return share.share - level > CLEAR * math.hypot(share.stderr, level_stderr)


def orders_below_top(share: OrderShare, num_tiers: int) -> bool:
    """Whether the full order holds more often than with random groups, whose tier 1 is the model's own top K, too.

    Where these were not measured, the C − 1 tiers below an ever likelier tier 1 stand in: 1/(C − 1)! by chance.
    """
    if share.random is None:
        return is_above(share, share.chance * num_tiers)
    return is_above(share, share.random, share.random_stderr)


def _read_ends(quality: TierQuality) -> str:
    ends = quality.order["ends"]
    text = f"Tier 1 is likelier than tier {quality.num_tiers} on {_share(ends)} of samples (chance 50 %)"
    if not is_above(ends, ends.chance):
        return f"{text}: the router's ranking says nothing about likelihood here, so there is no signal to train on."
    no_eos = quality.order["ends_no_eos"]
    if not is_above(no_eos, no_eos.chance):
        return f"{text}, but only through the end-of-sequence token: without it on {_share(no_eos)}."
    return f"{text}, without end-of-sequence tokens on {_share(no_eos)}."


def _read_full_order(quality: TierQuality) -> list[str]:
    if quality.num_tiers < 3:
        return []
    full, no_eos = quality.order["full"], quality.order["full_no_eos"]
    text = f"All {quality.num_tiers} tiers are in order on {_share(full)} of samples ({_levels(full)})"
    if not orders_below_top(full, quality.num_tiers):
        return [f"{text}: below tier 1 the tiers are no better ordered than random groups."]
    if not orders_below_top(no_eos, quality.num_tiers):
        lower = "middle over bottom" if quality.num_tiers == 3 else "the order below tier 1"
        return [
            f"{text}, but {lower} only through the end-of-sequence token: without it on {_share(no_eos)} "
            f"({_levels(no_eos)}), no more than noise above random groups."
        ]
    return [f"{text}, without end-of-sequence tokens on {_share(no_eos)} ({_levels(no_eos)})."]


def _read_means(quality: TierQuality) -> list[str]:
    """Most samples can be in order while the mean, which a few very unlikely answers decide, is not."""
    kinds = {"": "log_likelihood", " without end-of-sequence tokens": "log_likelihood_no_eos"}
    readings = []
    for upper, lower in pairwise(quality.tiers):
        for kind, name in kinds.items():
            above, below = getattr(upper, name), getattr(lower, name)
            if below > above:
                readings.append(
                    f"On average tier {lower.tier} is likelier than tier {upper.tier}{kind}, against the order: "
                    f"{below:.3f} against {above:.3f} nats per token."
                )
    return readings


def _read_answers(quality: TierQuality) -> str:
    accuracies = [f"{100 * tier.accuracy['overall']:.1f} %" for tier in quality.tiers]
    return f"Generated answers match exactly on {', '.join(accuracies)} of samples from tier 1 to {quality.num_tiers}."


def _read_correlation(quality: TierQuality) -> str:
    found = quality.spearman
    note = f" {found.note}" if found.note else ""
    rho, stderr = found.within_top.overall, found.within_top.stderr
    if rho is None:
        return f"Routing scores were not correlated with {found.quality}.{note}"
    verdict = "no more than noise" if abs(rho) <= CLEAR * stderr else "more than noise"
    return (
        f"Within tier 1, routing scores go with {found.quality} at Spearman's rho {rho:+.2f} (standard error of 0: "
        f"{stderr:.2f}), {verdict}.{note}"
    )


def _read_diversity(quality: TierQuality) -> list[str]:
    readings = []
    for tier, cosines in enumerate(zip(*quality.diversity, strict=True), start=1):
        alike = [layer for layer, cosine in enumerate(cosines) if cosine is not None and cosine >= ALIKE]
        if alike:
            readings.append(
                f"The experts of tier {tier} say nearly the same in MoE layers {alike}: cosine {ALIKE} or more."
            )
    return readings


def _share(share: OrderShare) -> str:
    return f"{100 * share.share:.1f} ± {100 * share.stderr:.1f} %"


def _levels(share: OrderShare) -> str:
    chance = f"chance {100 * share.chance:.1f} %"
    return chance if share.random is None else f"{chance}, random groups {100 * share.random:.1f} %"
