"""The report of what `ordmoe inspect` measured: can the routing be cut into tiers?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...monitoring.health import DEAD_SHARE, LayerHealth
from ..measure.inspection import HealthReport
from ..measure.verdict import NEXT_STEP
from .drawing import GREY, Plot, by_tier, line_plot
from .page import Findings, Section, write_page


# How to read each figure.
UTILISATION = (
    "How often each expert was chosen, relative to its fair share K / E: white is fair, purple less, orange more. A "
    f"white cross marks a dead expert (below {DEAD_SHARE:.0%} of its share); grey stands where a layer has no such "
    "expert."
)
ENTROPY = "Low over all tokens: few experts get all the work. Low per token: the router is sure of each choice."
GATE_MASS = "The weights that a tier's experts get under the router's own rule. A tier near 0 adds almost nothing."
PROBABILITY = "How much of the router's softmax lies on the experts of a tier."
DEVIATION = "Standard deviation of a token's routing scores over the experts. Near 0, the ranks mean nothing."
DRIFT = "How far the adapted routers moved from the base's on the same tokens."


def inspect_report(health: HealthReport, directory: str | Path, findings: Findings = None) -> Path:
    """Write the report of a router inspection: the verdict, expert utilisation, entropies, gate mass, drift.

    Args:
        health ([`~ordmoe_peft.tools.measure.inspection.HealthReport`]): what was measured.
        directory, findings: as [`write_page`] takes them.
    """
    verdict = ("Not fit to be cut into tiers as it is.", "The reasons:", "bad")
    if not health.reasons:
        verdict = ("Whether tiers can be cut is not known.", "The reasons:", "bad")
    if health.is_fit:
        verdict = ("Tiers can be cut.", NEXT_STEP, "good")
    return write_page(
        directory,
        "Router inspection",
        f"{health.model}: {len(health.layers)} MoE layers over {health.num_tokens:,} tokens, "
        f"C = {health.num_tiers} tiers, {health.grouping} grouping.",
        [
            Section("Utilisation", [_utilisation(health.layers)]),
            Section("By layer", _plots(health.layers)),
            Section("Numbers", tables=health.tables()),
        ],
        [verdict, *(("", reason, "") for reason in (*health.reasons, *health.unread))],
        findings,
    )


def _plots(layers: Sequence[LayerHealth]) -> list[Plot | None]:
    fields = pd.DataFrame(layers, columns=[field.name for field in dataclasses.fields(LayerHealth)]).set_index("layer")
    entropies = {"over all tokens": fields["marginal_entropy"], "per token": fields["token_entropy"]}
    masses = {"sum of a token's gate weights": by_tier(fields["gate_mass"])}
    probabilities = {"share of the probability": by_tier(fields["tier_probability"])}
    deviations = {"standard deviation (score units)": fields[["score_std"]]}
    drift = {
        "top-k shared\nwith the base (share)": fields[["drift_overlap"]],
        "KL from the base\n(nats per token)": fields[["drift_kl"]],
    }
    return [
        line_plot("entropy", "Routing entropy", {"entropy (share of ln E)": entropies}, "layer", ENTROPY),
        line_plot("gate_mass", "Gate mass of each tier", masses, "layer", GATE_MASS),
        line_plot("tier_probability", "Router probability of each tier", probabilities, "layer", PROBABILITY),
        line_plot("score_std", "Spread of routing scores", deviations, "layer", DEVIATION),
        line_plot("drift", "Drift from the base", drift, "layer", DRIFT),
    ]


def _utilisation(layers: Sequence[LayerHealth]) -> Plot | None:
    if not layers:
        return None
    num_experts = max(layer.num_experts for layer in layers)
    alt = f"Heat map of {len(layers)} layers by {num_experts} experts: utilisation relative to the fair share."
    return Plot("utilisation", alt, UTILISATION, lambda figure: _draw_utilisation(figure, layers), is_wide=True)


def _draw_utilisation(figure: Any, layers: Sequence[LayerHealth]) -> None:
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shares_LE = np.full((len(layers), max(layer.num_experts for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        shares_LE[row, : layer.num_experts] = layer.utilisation
    # The few experts beyond the colours' end would leave all others pale.
    top = max(2.0, float(np.nanpercentile(shares_LE, 99)))
    figure.set_figheight(min(max(2.0 + 0.14 * len(layers), 3.2), 12))
    axes = figure.add_subplot(facecolor="#c9ccd1")
    image = axes.imshow(shares_LE, cmap="PuOr_r", norm=TwoSlopeNorm(1.0, 0.0, top), aspect="auto", interpolation="none")
    dead_rows, dead_columns = np.nonzero(shares_LE < DEAD_SHARE)
    size = min(max(figure.get_figwidth() * 40 / shares_LE.shape[1], 2.8), 6) ** 2
    axes.scatter(dead_columns, dead_rows, marker="x", s=size, color="white", linewidths=1)
    axes.set(xlabel="expert", ylabel="layer", title="Expert utilisation")
    axes.grid(False)
    names = [str(layer.layer) for layer in layers]
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: names[round(y)] if 0 <= y < len(names) else ""))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    has_more = np.nanmax(shares_LE) > top
    bar = figure.colorbar(image, location="bottom", aspect=40, pad=0.02, extend="max" if has_more else "neither")
    bar.set_label("utilisation (1 = fair share)")
    ticks = (0.0, 0.5, 1.0, (1 + top) / 2, top)
    bar.set_ticks(ticks, labels=[f"{tick:.1f}" for tick in ticks])
    bar.ax.axvline(1.0, color=GREY, linewidth=1)
