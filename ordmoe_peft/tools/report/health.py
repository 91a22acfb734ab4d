"""The report of what `ordmoe inspect` measured: can the routing be cut into tiers?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure.verdict import NEXT_STEP
from . import page
from .drawing import GREY, Plot, Series, draw, line_plot, prepare, stacked_plot


def inspect_report(health: Mapping[str, Any], directory: "str | Path") -> Path:
    """Write the report of a router inspection: the verdict, expert utilisation, entropies, gate mass, drift.

    Args:
        health (`Mapping`): `model`, `num_tokens`, `num_tiers`, `grouping`, `is_fit`, `reasons` (texts), and `layers`,
            each with `layer`, `name`, `num_experts`, `top_k`, `utilisation` (a number per expert, 1 is the fair
            share), `dead`, `imbalance`, `marginal_entropy` and `token_entropy` (over ln E), `score_std`,
            `gate_mass` and `tier_probability` (a number per tier), `drift_overlap`, `drift_kl` (None without adapter);
            optionally `findings`, as [`train_report`] takes them.
        directory (`str` or `Path`): folder for `report.html` and a PNG of each figure.

    Returns:
        `Path`: the page.

    Raises:
        [`OrdMoEConfigError`]: matplotlib is not installed.
    """
    directory = prepare(directory)
    layers = health["layers"]
    plots = [_entropies(layers), _per_tier(layers, *GATE_MASS), _per_tier(layers, *PROBABILITY), _scores(layers)]
    html = page.page(
        "Router inspection",
        f"{health['model']}: {len(layers)} MoE layers over {health['num_tokens']:,} tokens, "
        f"C = {health['num_tiers']} tiers, {health['grouping']} grouping.",
        _verdict(health),
        page.findings(health.get("findings") or None),
        page.section("Utilisation", draw([_utilisation(layers)], directory)),
        page.section("By layer", draw([*plots, _drift(layers)], directory)),
        page.section("Numbers", _table(layers)),
    )
    return page.write_page(directory, html)


def _verdict(health: Mapping[str, Any]) -> str:
    if health["is_fit"]:
        boxes = [page.note("Tiers can be cut.", NEXT_STEP, "good")]
    else:
        boxes = [page.note("Not fit to be cut into tiers as it is.", "The reasons:", "bad")]
    return "\n".join([*boxes, *(page.note("", reason) for reason in health["reasons"])])


def _utilisation(layers: Sequence[Mapping[str, Any]]) -> Plot | None:
    if not layers:
        return None
    num_experts = max(layer["num_experts"] for layer in layers)
    caption = (
        "How often each expert was chosen, relative to its fair share K / E: white is fair, purple less, orange more. "
        "A white cross marks a dead expert (below 1 % of its share); grey stands where a layer has no such expert."
    )
    alt = f"Heat map of {len(layers)} layers by {num_experts} experts: utilisation relative to the fair share."
    return Plot("utilisation", alt, caption, lambda figure: _draw_utilisation(figure, layers), is_wide=True)


def _draw_utilisation(figure: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shares_LE = np.full((len(layers), max(layer["num_experts"] for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        shares_LE[row, : layer["num_experts"]] = layer["utilisation"]
    # The few experts beyond the colours' end would leave all others pale.
    top = max(2.0, float(np.nanpercentile(shares_LE, 99)))
    figure.set_figheight(min(max(2.0 + 0.14 * len(layers), 3.2), 12))
    axes = figure.add_subplot(facecolor="#c9ccd1")
    image = axes.imshow(shares_LE, cmap="PuOr_r", norm=TwoSlopeNorm(1.0, 0.0, top), aspect="auto", interpolation="none")
    dead_rows, dead_columns = np.nonzero(shares_LE < 0.01)
    size = min(max(figure.get_figwidth() * 40 / shares_LE.shape[1], 2.8), 6) ** 2
    axes.scatter(dead_columns, dead_rows, marker="x", s=size, color="white", linewidths=1)
    axes.set(xlabel="expert", ylabel="layer", title="Expert utilisation")
    axes.grid(False)
    names = [str(layer["layer"]) for layer in layers]
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: names[round(y)] if 0 <= y < len(names) else ""))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    has_more = np.nanmax(shares_LE) > top
    bar = figure.colorbar(image, location="bottom", aspect=40, pad=0.02, extend="max" if has_more else "neither")
    bar.set_label("utilisation (1 = fair share)")
    ticks = (0.0, 0.5, 1.0, (1 + top) / 2, top)
    bar.set_ticks(ticks, labels=[f"{tick:.1f}" for tick in ticks])
    bar.ax.axvline(1.0, color=GREY, linewidth=1)


def _by_layer(layers: Sequence[Mapping[str, Any]], key: str, label: str, style: int = 0) -> Series:
    return Series(label, [layer["layer"] for layer in layers], [layer.get(key) for layer in layers], style)


def _entropies(layers: Sequence[Mapping[str, Any]]) -> Plot | None:
    series = [
        _by_layer(layers, "marginal_entropy", "over all tokens"),
        _by_layer(layers, "token_entropy", "per token", 1),
    ]
    caption = "Low over all tokens: few experts get all the work. Low per token: the router is sure of each choice."
    return line_plot("entropy", "Routing entropy", series, "entropy (share of ln E)", "layer", caption)


# Key, title, y axis, caption.
GATE_MASS = (
    "gate_mass",
    "Gate mass of each tier",
    "sum of a token's gate weights",
    "The weights that a tier's experts get under the router's own rule. A tier near 0 adds almost nothing.",
)
PROBABILITY = (
    "tier_probability",
    "Router probability of each tier",
    "share of the probability",
    "How much of the router's softmax lies on the experts of a tier.",
)


def _per_tier(layers: Sequence[Mapping[str, Any]], key: str, title: str, ylabel: str, caption: str) -> Plot | None:
    numbers = [layer["layer"] for layer in layers]
    num_tiers = max((len(layer.get(key) or ()) for layer in layers), default=0)
    rows = [[*(layer.get(key) or ()), *[None] * num_tiers] for layer in layers]
    series = [Series(f"tier {tier + 1}", numbers, [row[tier] for row in rows], tier) for tier in range(num_tiers)]
    return line_plot(key, title, series, ylabel, "layer", caption)


def _scores(layers: Sequence[Mapping[str, Any]]) -> Plot | None:
    series = [_by_layer(layers, "score_std", "score deviation")]
    caption = "Standard deviation of a token's routing scores over the experts. Near 0, the ranks mean nothing."
    return line_plot(
        "score_std", "Spread of routing scores", series, "standard deviation (score units)", "layer", caption
    )


def _drift(layers: Sequence[Mapping[str, Any]]) -> Plot | None:
    panels = [
        ("top-k shared\nwith the base (share)", [_by_layer(layers, "drift_overlap", "overlap")]),
        ("KL from the base\n(nats per token)", [_by_layer(layers, "drift_kl", "KL")]),
    ]
    caption = "How far the adapted routers moved from the base's on the same tokens."
    return stacked_plot("drift", "Drift from the base", panels, "layer", caption)


def _table(layers: Sequence[Mapping[str, Any]]) -> str:
    columns = ("layer", "module", "E", "K", "dead", "imbalance", "entropy, all tokens", "entropy, per token")
    columns += ("score deviation", "gate mass by tier", "shared top-k", "KL")
    return page.table(columns, [_row(layer) for layer in layers])


def _row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        *(str(layer[key]) for key in ("layer", "name", "num_experts", "top_k", "dead")),
        *(page.number(layer[key]) for key in ("imbalance", "marginal_entropy", "token_entropy", "score_std")),
        " / ".join(page.number(mass) for mass in layer["gate_mass"]),
        page.number(layer.get("drift_overlap")),
        page.number(layer.get("drift_kl"), 4),
    )
