"""The report of what `ordmoe tiers` measured: do the tiers differ in the order that the method assumes?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..measure.evaluation import OVERALL
from ..measure.quality import ORDERS, OrderShare, TierQuality
from ..tables import percent
from .drawing import BLUE, MARKERS, VERMILION, Plot, by_tier, legend, line_plot, named_rows
from .page import Findings, Section, write_page


# What the shares stand beside: field of an order's share, label, marker, its size in points, colour.
MARKS = (("random", "random tiers", "s", 10, VERMILION), ("chance", "chance", "|", 15, "black"))

NATS = "log-likelihood (nats per token)"
# How to read each figure.
LIKELIHOOD = (
    "Mean log-likelihood of the reference responses under each tier. It should fall from left to right. Tier 1 says "
    "which tokens are confident, which lifts it there and lowers it on fragile ones: compare the tiers below it."
)
ACCURACY = "Share of answers, written under each tier, that match the reference exactly."
ORDER = (
    "Share of samples whose likelihoods fall in the order of the tiers, with 95 % intervals, beside tiers cut at "
    "random and what pure chance would give. An order that goes away without end tokens is about the end alone. Tier 1 "
    "says which tokens are confident, so over those and over fragile ones only the tiers below it are compared. The "
    "class with more tokens a sample has less noise, and is in order more often for that reason, too."
)
SPEARMAN = (
    "Rank correlation of routing scores with the quality of the response, layer by layer; 0 says that a router's score "
    "tells nothing about quality. Layers without a value had no variation."
)
DIVERSITY = "Mean cosine between the outputs of a tier's experts on the same token: 1 is the same, 0 unrelated."


def tiers_report(quality: TierQuality, directory: str | Path, findings: Findings = None) -> Path:
    """Write the report of the tiers' quality: likelihood, accuracy, order, correlation, diversity, texts.

    Args:
        quality ([`~ordmoe_peft.tools.measure.quality.TierQuality`]): what was measured.
        directory, findings: as [`write_page`] takes them.
    """
    tiers, order, layers, *texts = quality.tables()
    return write_page(
        directory,
        "Tier quality",
        f"{quality.model}: {quality.num_samples:,} samples, C = {quality.num_tiers} tiers, "
        f"{quality.grouping} grouping.",
        [
            Section("Quality by tier", _by_tier(quality), [tiers]),
            Section("Order", [_order(quality.order)], [order]),
            Section("Experts", _by_layer(quality), [layers]),
            Section("Texts side by side", tables=texts),
        ],
        findings=findings,
    )


def _by_tier(quality: TierQuality) -> list[Plot | None]:
    tiers = pd.DataFrame(quality.tiers).set_index("tier")
    likelihoods = {
        "whole response": tiers["log_likelihood"],
        "without end tokens": tiers["log_likelihood_no_eos"],
        "confident tokens": tiers["log_likelihood_confident"],
        "fragile tokens": tiers["log_likelihood_fragile"],
    }
    accuracies = pd.DataFrame(tiers["accuracy"].tolist(), index=tiers.index)
    accuracies = accuracies[sorted(accuracies.columns, key=lambda group: group != OVERALL)]
    return [
        line_plot("likelihood", "Likelihood by tier", {NATS: likelihoods}, "tier", LIKELIHOOD),
        line_plot("accuracy", "Accuracy by tier", {"share of samples": accuracies}, "tier", ACCURACY),
    ]


def _by_layer(quality: TierQuality) -> list[Plot | None]:
    found = quality.spearman
    columns = {"within tier 1": found.within_top.layers, "over all tiers": found.pooled.layers}
    correlations = {"Spearman correlation (from \u22121 to 1)": pd.DataFrame(columns)}
    cosines = {"mean pairwise cosine": by_tier(pd.Series(quality.diversity))}
    return [
        line_plot("spearman", "Routing score and quality", correlations, "MoE layer", SPEARMAN),
        line_plot("diversity", "Likeness of a tier's experts", cosines, "MoE layer", DIVERSITY),
    ]


def _order(order: Mapping[str, OrderShare]) -> Plot | None:
    shares = [(order[key], label) for key, label in ORDERS.items() if key in order and order[key].num_samples]
    if not shares:
        return None
    words = "; ".join(f"{label} {percent(one.share)}" for one, label in shares)
    alt = f"Share of samples in order: {words}"
    return Plot("order", alt, ORDER, lambda figure: _draw_order(figure, shares))


def _draw_order(figure: Any, shares: Sequence[tuple[OrderShare, str]]) -> None:
    axes, rows = named_rows(figure, [label for _, label in shares])
    half = [1.96 * (one.stderr or 0) for one, _ in shares]
    points = [one.share for one, _ in shares]
    axes.errorbar(points, rows, xerr=half, fmt=MARKERS[0], color=BLUE, capsize=4, markersize=8, label="these tiers")
    for field, label, marker, size, color in MARKS:
        values = [getattr(one, field) for one, _ in shares]
        if None not in values:
            axes.plot(values, rows, marker, color=color, markerfacecolor="none", markersize=size, label=label)
    axes.set(xlim=(-0.02, 1.02), xlabel="share of samples", title="Order of the tiers")
    legend(figure, axes)
