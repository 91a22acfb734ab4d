"""The report of what `ordmoe tiers` measured: do the tiers differ in the order that the method assumes?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import page
from .drawing import BLUE, MARKERS, VERMILION, Plot, Series, draw, legend, line_plot, prepare


# Key in `order`, label.
ORDERS = (
    ("full", "all tiers\nin order"),
    ("full_no_eos", "all in order,\nwithout end"),
    ("ends", "tier 1 over\ntier C"),
    ("ends_no_eos", "1 over C,\nwithout end"),
)
# What the shares stand beside. Key, label, marker, its size in points, colour.
MARKS = (("random", "random tiers", "s", 10, VERMILION), ("chance", "chance", "|", 22, "black"))
# Key in `spearman`, label.
CORRELATIONS = (("within_top", "within tier 1"), ("pooled", "over all tiers"))


def tiers_report(quality: Mapping[str, Any], directory: "str | Path") -> Path:
    """Write the report of the tiers' quality: likelihood, accuracy, order, correlation, diversity, texts.

    Args:
        quality (`Mapping`): `model`, `num_samples`, `num_tiers`, `grouping`; `tiers`, each with `tier`,
            `log_likelihood`, `log_likelihood_no_eos` (nats per token) and `accuracy` (a share per group, "overall"
            among them); `order` with "full", "ends", "full_no_eos", "ends_no_eos", each with `share`, `stderr`,
            `chance` and `random`; `spearman` with `within_top` and `pooled` (each with `overall` and `layers`, None
            where undefined), `quality` and `note`; `diversity`, per layer a mean cosine per tier; `texts`, each with
            `prompt`, `reference` and `answers` by tier; optionally `findings`, as [`train_report`] takes them.
        directory (`str` or `Path`): folder for `report.html` and a PNG of each figure.

    Returns:
        `Path`: the page.

    Raises:
        [`OrdMoEConfigError`]: matplotlib is not installed.
    """
    directory = prepare(directory)
    spearman = quality.get("spearman") or {}
    order = quality.get("order") or {}
    plots = [_likelihood(quality["tiers"]), _accuracy(quality["tiers"])]
    html = page.page(
        "Tier quality",
        f"{quality['model']}: {quality['num_samples']:,} samples, C = {quality['num_tiers']} tiers, "
        f"{quality['grouping']} grouping.",
        page.findings(quality.get("findings")),
        page.section("Quality by tier", draw(plots, directory), _tier_table(quality["tiers"])),
        page.section("Order", draw([_order(order)], directory), _order_table(order)),
        page.section(
            "Experts",
            draw([_spearman(spearman), _diversity(quality.get("diversity") or ())], directory),
            *_spearman_words(spearman),
        ),
        page.section("Texts side by side", _texts(quality.get("texts") or (), quality["num_tiers"])),
    )
    return page.write_page(directory, html)


def _likelihood(tiers: Sequence[Mapping[str, Any]]) -> Plot | None:
    numbers = [tier["tier"] for tier in tiers]
    series = [
        Series("whole response", numbers, [tier.get("log_likelihood") for tier in tiers]),
        Series("without end tokens", numbers, [tier.get("log_likelihood_no_eos") for tier in tiers], 1),
    ]
    caption = "Mean log-likelihood of the reference responses under each tier. It should fall from left to right."
    return line_plot("likelihood", "Likelihood by tier", series, "log-likelihood (nats per token)", "tier", caption)


def _groups(tiers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every group that any tier has, "overall" first."""
    names = dict.fromkeys(name for tier in tiers for name in tier.get("accuracy") or {})
    return sorted(names, key=lambda name: name != "overall")


def _accuracy(tiers: Sequence[Mapping[str, Any]]) -> Plot | None:
    numbers = [tier["tier"] for tier in tiers]
    series = [
        Series(name, numbers, [(tier.get("accuracy") or {}).get(name) for tier in tiers], style)
        for style, name in enumerate(_groups(tiers))
    ]
    caption = "Share of answers, written under each tier, that match the reference exactly."
    return line_plot("accuracy", "Accuracy by tier", series, "share of samples", "tier", caption)


def _order(order: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    present = [(order[key], label) for key, label in ORDERS if page.is_number((order.get(key) or {}).get("share"))]
    if not present:
        return None
    caption = (
        "Share of samples whose likelihoods fall in the order of the tiers, with 95 % intervals, beside tiers cut at "
        "random and what pure chance would give. An order that goes away without end tokens is about the end alone."
    )
    alt = "Share of samples in order: " + "; ".join(
        f"{label} {page.percent(one['share'])}" for one, label in present
    ).replace("\n", " ")
    return Plot("order", alt, caption, lambda figure: _draw_order(figure, present), is_wide=True)


def _draw_order(figure: Any, present: Sequence[tuple[Mapping[str, Any], str]]) -> None:
    figure.set_figheight(1.6 + 0.62 * len(present))
    axes = figure.add_subplot()
    rows = range(len(present))
    shares = [one["share"] for one, _ in present]
    half = [1.96 * (one.get("stderr") or 0) for one, _ in present]
    axes.errorbar(shares, rows, xerr=half, fmt=MARKERS[0], color=BLUE, capsize=4, markersize=8, label="these tiers")
    for key, label, marker, size, color in MARKS:
        points = [(one.get(key), row) for row, (one, _) in enumerate(present) if page.is_number(one.get(key))]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker, color=color, markerfacecolor="none", markersize=size, label=label
            )
    axes.set_yticks(rows, [label for _, label in present])
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set(xlim=(-0.02, 1.02), xlabel="share of samples", title="Order of the tiers")
    legend(figure, axes)


def _order_table(order: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            label.replace("\n", " "),
            page.percent(order[key].get("share")),
            page.percent(order[key].get("stderr")),
            page.percent(order[key].get("random")),
            page.percent(order[key].get("chance")),
        )
        for key, label in ORDERS
        if order.get(key)
    ]
    return page.table(("order of the likelihoods", "share", "standard error", "random tiers", "chance"), rows)


def _tier_table(tiers: Sequence[Mapping[str, Any]]) -> str:
    groups = _groups(tiers)
    rows = [
        (
            str(tier["tier"]),
            page.number(tier.get("log_likelihood")),
            page.number(tier.get("log_likelihood_no_eos")),
            *(page.percent((tier.get("accuracy") or {}).get(name)) for name in groups),
        )
        for tier in tiers
    ]
    return page.table(("tier", "log-likelihood (nats)", "without end tokens", *groups), rows)


def _spearman(spearman: Mapping[str, Any]) -> Plot | None:
    series = []
    for style, (key, label) in enumerate(CORRELATIONS):
        layers = (spearman.get(key) or {}).get("layers") or []
        series.append(Series(label, range(1, len(layers) + 1), layers, style))
    caption = (
        "Rank correlation of routing scores with the quality of the response, layer by layer; 0 says that a router's "
        "score tells nothing about quality. Layers without a value had no variation."
    )
    return line_plot(
        "spearman",
        "Routing score and quality",
        series,
        "Spearman correlation (from \u22121 to 1)",
        "MoE layer (1 is the first)",
        caption,
    )


def _spearman_words(spearman: Mapping[str, Any]) -> list[str]:
    means = ", ".join(
        f"{page.number((spearman.get(key) or {}).get('overall'))} {label}"
        for key, label in CORRELATIONS
        if spearman.get(key)
    )
    parts = [page.paragraph(f"Spearman correlation over all layers: {means}.")] if means else []
    if spearman.get("quality"):
        parts.append(page.paragraph(f"Quality is {spearman['quality']}."))
    return parts + ([page.note("Note.", spearman["note"])] if spearman.get("note") else [])


def _diversity(layers: Sequence[Sequence[float | None]]) -> Plot | None:
    num_tiers = max(map(len, layers), default=0)
    series = [
        Series(f"tier {tier + 1}", range(1, len(layers) + 1), [layer[tier] for layer in layers], tier)
        for tier in range(num_tiers)
    ]
    caption = "Mean cosine between the outputs of a tier's experts on the same token: 1 is the same, 0 unrelated."
    return line_plot(
        "diversity",
        "Likeness of a tier's experts",
        series,
        "mean pairwise cosine",
        "MoE layer (1 is the first)",
        caption,
    )


def _texts(texts: Sequence[Mapping[str, Any]], num_tiers: int) -> str:
    columns = ("prompt", "reference", *(f"tier {tier}" for tier in range(1, num_tiers + 1)))
    rows = [
        (
            one["prompt"],
            one["reference"],
            *(answer if answer is not None else page.MISSING for answer in one["answers"]),
        )
        for one in texts
    ]
    return page.table(columns, rows)
