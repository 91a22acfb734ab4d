"""The report of what `ordmoe ablate` measured: paired differences with their intervals, and what a step costs."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from . import page
from .drawing import BLUE, GREEN, GREY, VERMILION, WIDE, Plot, draw, legend, prepare


# Label, marker, colour, whether the marker is filled.
GAIN = ("gain: interval above 0", "o", GREEN, True)
LOSS = ("loss: interval below 0", "v", VERMILION, True)
OPEN = ("undecided: interval holds 0", "D", GREY, False)


def ablate_report(results: Mapping[str, Any], directory: "str | Path") -> Path:
    """Write the report of an ablation.

    Args:
        results (`Mapping`): `baseline` (a cell's name), `metric`, `unit`, `notes` (texts), and `cells`, each with
            `name`, `settings`, `chosen`, `mean`, `stderr`, `per_seed`, `difference` (None, or `mean`, `low`, `high`,
            `is_gain` and `verdict` against the baseline), `log_likelihood` (None, or its `mean`, `stderr` and
            `difference`), `tier_log_likelihood` (nats per token by tier, or None) and `seconds_per_step`.
        directory (`str` or `Path`): folder for `report.html` and a PNG of each figure.

    Returns:
        `Path`: the page.

    Raises:
        [`OrdMoEConfigError`]: matplotlib is not installed.
    """
    directory = prepare(directory)
    cells, unit = results["cells"], results["unit"]
    intervals = [
        _differences(results, "difference", f"{results['metric']} ({unit})"),
        _differences(results, "log_likelihood", "log-likelihood (nats per token)"),
    ]
    html = page.page(
        "Ablation",
        f"{len(cells)} cells, each against {results['baseline']} on the same seeds and samples; {results['metric']} "
        f"in {unit}, 95 % intervals.",
        *(page.note("Note.", text) for text in results.get("notes") or ()),
        page.section("Differences", draw(intervals, directory)),
        page.section("Cost", draw([_cost(cells)], directory)),
        page.section("Cells", _table(results), page.folded("Settings of each cell", _settings(cells))),
    )
    return page.write_page(directory, html)


def _differences(results: Mapping[str, Any], key: str, what: str) -> Plot | None:
    measured = [(cell, _difference(cell, key)) for cell in results["cells"]]
    cells = [(cell["name"], difference) for cell, difference in measured if page.is_number(difference.get("mean"))]
    if not cells:
        return None
    caption = (
        f"Paired differences from {results['baseline']} with 95 % intervals. A cell whose interval holds 0 is neither "
        "a gain nor a loss."
    )
    alt = f"Difference in {what} from {results['baseline']}: " + "; ".join(
        f"{name} {page.number(difference['mean'], signed=True)}" for name, difference in cells
    )
    return Plot(key, alt, caption, lambda figure: _draw_differences(figure, cells, what, results["baseline"]), True)


def _difference(cell: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A cell's difference from the baseline, in the metric or in `log_likelihood`; empty where there is none."""
    return (cell if key == "difference" else cell.get(key) or {}).get("difference") or {}


def _draw_differences(figure: Any, cells: Sequence[tuple[str, Mapping[str, Any]]], what: str, baseline: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes, rows = _rows(figure, [name for name, _ in cells])
    for kind in (GAIN, OPEN, LOSS):
        label, marker, color, is_filled = kind
        for row, (_, difference) in zip(rows, cells, strict=True):
            if _kind(difference) is not kind:
                continue
            mean, low, high = (difference[part] for part in ("mean", "low", "high"))
            axes.plot([low, high], [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
            face = color if is_filled else "white"
            axes.plot(mean, row, marker, color=color, markerfacecolor=face, markersize=7.5, label=label)
            # One entry in the legend for all cells of a kind.
            label = "_"
    axes.axvline(0, color="black", linewidth=1.2)
    is_narrow = figure.get_figwidth() != WIDE
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(3 if is_narrow else 8))
    axes.set_title(_wrap(f"Difference from {baseline}", 26 if is_narrow else 60))
    axes.set_xlabel(_wrap(f"difference in {what}", 26 if is_narrow else 80))
    legend(figure, axes, is_needed=True)


def _kind(difference: Mapping[str, Any]) -> tuple:
    if difference["low"] > 0:
        return GAIN
    return LOSS if difference["high"] < 0 else OPEN


def _rows(figure: Any, names: Sequence[str]) -> tuple[Any, list[float]]:
    """Axes with a row for each cell, its wrapped name to the left, and the rows' places, counted in lines of text."""
    width = 40 if figure.get_figwidth() == WIDE else 24
    names = [_wrap(name, width) for name in names]
    heights = [name.count("\n") + 1.7 for name in names]
    ends = list(accumulate(heights))
    rows = [end - height / 2 for end, height in zip(ends, heights, strict=True)]
    figure.set_figheight(1.5 + 0.18 * ends[-1])
    axes = figure.add_subplot()
    axes.set_yticks(rows, names)
    axes.set_ylim(ends[-1], 0)
    axes.grid(False, axis="y")
    return axes, rows


def _wrap(text: str, width: int) -> str:
    """Text in lines, broken at spaces and after commas, which part the settings in a cell's name."""
    return "\n".join(textwrap.wrap(re.sub(r",\s*", ", ", text), width, break_on_hyphens=False)) or text


def _cost(cells: Sequence[Mapping[str, Any]]) -> Plot | None:
    timed = [cell for cell in cells if page.is_number(cell.get("seconds_per_step"))]
    if not timed:
        return None
    alt = "Seconds per step: " + "; ".join(
        f"{cell['name']} {page.number(cell['seconds_per_step'], 2)}" for cell in timed
    )
    caption = "Wall-clock of an optimiser step, mean over the seeds, on the machine of the run."
    return Plot("cost", alt, caption, lambda figure: _draw_cost(figure, timed), is_wide=True)


def _draw_cost(figure: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    axes, rows = _rows(figure, [cell["name"] for cell in cells])
    seconds = [cell["seconds_per_step"] for cell in cells]
    bars = axes.barh(rows, seconds, color=BLUE, height=0.9)
    axes.bar_label(bars, [page.number(value, 2) for value in seconds], padding=4)
    axes.set_xlim(0, 1.18 * max(seconds) or 1)
    axes.set(xlabel="seconds per step", title="Cost of a step")


def _table(results: Mapping[str, Any]) -> str:
    columns = ("cell", f"{results['metric']} ({results['unit']})", "difference", "verdict")
    columns += (
        "log-likelihood (nats)",
        "its difference",
        "tiers' log-likelihood (nats)",
        "seconds per step",
        "per seed",
    )
    return page.table(columns, [_row(cell, results["baseline"]) for cell in results["cells"]])


def _row(cell: Mapping[str, Any], baseline: str) -> tuple[str, ...]:
    difference = cell.get("difference") or {}
    verdict = "baseline" if cell["name"] == baseline else difference.get("verdict", page.MISSING)
    return (
        cell["name"],
        f"{page.number(cell.get('mean'))} ± {page.number(cell.get('stderr'))}",
        _interval(cell.get("difference")),
        verdict,
        page.number((cell.get("log_likelihood") or {}).get("mean")),
        _interval(_difference(cell, "log_likelihood")),
        " / ".join(page.number(value, 2) for value in cell.get("tier_log_likelihood") or ()) or page.MISSING,
        page.number(cell.get("seconds_per_step"), 2),
        " / ".join(page.number(value) for value in cell.get("per_seed") or ()) or page.MISSING,
    )


def _interval(difference: Mapping[str, Any] | None) -> str:
    if not difference:
        return page.MISSING
    mean, low, high = (page.number(difference.get(key), signed=True) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _settings(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = [(cell["name"], _words(cell.get("settings")), _words(cell.get("chosen"))) for cell in cells]
    return page.table(("cell", "settings", "chosen on validation"), rows)


def _words(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name}={value}" for name, value in (values or {}).items()) or page.MISSING
