"""The report of what `ordmoe ablate` measured: paired differences with their intervals, and what a step costs."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..ablate.grid import METRICS, other_metric
from ..tables import MISSING, Format, Table, is_number, number, numbers, signed
from .drawing import BLUE, GREEN, GREY, VERMILION, Plot, legend, named_rows, widen, wrap
from .page import Section, write_page


Cell = Mapping[str, Any]

# Label, marker, colour, whether the marker is filled.
GAIN = ("gain: interval above 0", "o", GREEN, True)
LOSS = ("loss: interval below 0", "v", VERMILION, True)
OPEN = ("undecided: interval holds 0", "D", GREY, False)


def ablate_report(results: Mapping[str, Any], directory: str | Path) -> Path:
    """Write the report of an ablation.

    Args:
        results (`Mapping`): `baseline` (a cell's name), `metric`, `unit`, `notes` (texts), and `cells`, each with
            `name`, `settings`, `chosen`, `mean`, `stderr`, `per_seed`, `difference` (None, or `mean`, `low`, `high`,
            `is_gain` and `verdict` against the baseline), the metric that validation did not choose by (None, or
            its `mean`, `stderr` and `difference`), `tier_log_likelihood` (nats per token by tier, or None) and
            `seconds_per_step`.
        directory: as [`write_page`] takes it.
    """
    cells, baseline = results["cells"], results["baseline"]
    metric = f"{results['metric']} ({results['unit']})"
    other = other_metric(results["metric"])
    heading = f"{other.replace('_', '-')} ({METRICS[other][0]})"
    of_other = [{"name": cell["name"], **(cell.get(other) or {})} for cell in cells]
    differences = [
        _differences("difference", metric, cells, baseline),
        _differences(other, heading, of_other, baseline),
    ]
    return write_page(
        directory,
        "Ablation",
        f"{len(cells)} cells, each against {baseline} on the same seeds and samples; {results['metric']} in "
        f"{results['unit']}, 95 % intervals.",
        [
            Section("Differences", differences),
            Section("Cost", [_cost(cells)]),
            Section(
                "Cells", tables=[_table(cells, metric, (other, heading), baseline)], folded=[_settings_table(cells)]
            ),
        ],
        [("Note.", text, "") for text in results.get("notes") or ()],
    )


# ------------------------------------------------------------------------------------------------------------ figures
def _differences(name: str, what: str, cells: Sequence[Cell], baseline: str) -> Plot | None:
    shown = [
        (cell["name"], cell["difference"]) for cell in cells if is_number((cell.get("difference") or {}).get("mean"))
    ]
    if not shown:
        return None
    caption = (
        f"Paired differences from {baseline} with 95 % intervals. A cell whose interval holds 0 is neither a gain nor "
        "a loss."
    )
    words = "; ".join(f"{cell} {signed(difference['mean'])}" for cell, difference in shown)
    alt = f"Difference in {what} from {baseline}: {words}"
    return Plot(name, alt, caption, lambda figure: _draw_differences(figure, shown, what, baseline))


def _draw_differences(figure: Any, cells: Sequence[tuple[str, Cell]], what: str, baseline: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes, rows = named_rows(figure, [name for name, _ in cells])
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
    axes.axvline(0, color="black", linewidth=1.2, zorder=0.4)
    axes.margins(x=0.06)
    widen(axes, "x")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.set_title(wrap(f"Difference from {baseline}", 40))
    axes.set_xlabel(wrap(f"difference in {what}", 46))
    legend(figure, axes, is_needed=True)


def _kind(difference: Cell) -> tuple:
    if difference["low"] > 0:
        return GAIN
    return LOSS if difference["high"] < 0 else OPEN


def _cost(cells: Sequence[Cell]) -> Plot | None:
    timed = [(cell["name"], cell["seconds_per_step"]) for cell in cells if is_number(cell.get("seconds_per_step"))]
    if not timed:
        return None
    names, seconds = zip(*timed, strict=True)

    def draw(figure: Any) -> None:
        axes, rows = named_rows(figure, names)
        bars = axes.barh(rows, seconds, color=BLUE, height=0.9)
        axes.bar_label(bars, [number(value, 2) for value in seconds], padding=4)
        axes.set_xlim(0, 1.18 * max(seconds) or 1)
        axes.set(xlabel="seconds per step", title="Cost of a step")

    alt = "Seconds per step: " + "; ".join(f"{name} {number(value, 2)}" for name, value in timed)
    caption = "Wall-clock of an optimiser step, mean over the seeds, on the machine of the run."
    return Plot("cost", alt, caption, draw)


# ------------------------------------------------------------------------------------------------------------- tables
def _table(cells: Sequence[Cell], metric: str, of_other: tuple[str, str], baseline: str) -> Table:
    other, heading = of_other
    rows = [
        {
            "cell": cell["name"],
            metric: f"{number(cell.get('mean'))} ± {number(cell.get('stderr'))}",
            "difference": _interval(cell.get("difference")),
            "verdict": "baseline" if cell["name"] == baseline else (cell.get("difference") or {}).get("verdict"),
            heading: (cell.get(other) or {}).get("mean"),
            "its difference": _interval((cell.get(other) or {}).get("difference")),
            "tiers' log-likelihood (nats)": cell.get("tier_log_likelihood"),
            "seconds per step": cell.get("seconds_per_step"),
            "per seed": cell.get("per_seed"),
        }
        for cell in cells
    ]
    formats: dict[str, Format] = {
        heading: number,
        "tiers' log-likelihood (nats)": partial(numbers, digits=2),
        "seconds per step": partial(number, digits=2),
        "per seed": numbers,
    }
    return Table("", pd.DataFrame(rows), formats)


def _interval(difference: Cell | None) -> str:
    if not difference:
        return MISSING
    mean, low, high = (signed(difference.get(part)) for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _settings_table(cells: Sequence[Cell]) -> Table:
    def words(values: Cell | None) -> str:
        return ", ".join(f"{name}={value}" for name, value in (values or {}).items()) or MISSING

    rows = [(cell["name"], words(cell.get("settings")), words(cell.get("chosen"))) for cell in cells]
    return Table("Settings of each cell", pd.DataFrame(rows, columns=["cell", "settings", "chosen on validation"]))
