"""Drawing: how every figure of a report looks, and how it gets into the page and into a file beside it.

matplotlib is an extra and is imported here, on use, through its object interface: no pyplot, no state left behind.
"""

import base64
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from ...errors import OrdMoEConfigError


# Label → values by x.
Lines: TypeAlias = "Mapping[str, pd.Series] | pd.DataFrame"

# Inches. A narrow figure fills a phone at almost 1×, so its letters stay as large as they were drawn; a wide one is
# drawn again for it.
NARROW, WIDE = 4.4, 9.4
# What is less than this is rounding: an axis spans at least as much, and the smallest number of a table is as large.
SMALLEST_SPAN = 1e-3
# A sum of positive float32 terms may come out this far below 0.
ROUNDING = 1e-6
FONT_POINTS = 10.6
# Okabe and Ito's colours, told apart with any colour vision; line and marker repeat the difference.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
BLUE, VERMILION, GREEN = COLORS[:3]
GREY = "#6b6f76"
# What the label of a hollow line ends in: a second measurement of the line of the same name.
HELD_OUT = ", held out"
RC = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_POINTS,
    "axes.titlesize": FONT_POINTS + 0.6,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), FONT_POINTS),
    "legend.frameon": False,
    # Inches around the axes: a tick label that grows by a digit after the layout still has room.
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.07,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    # Numbers as they are, with no "1e−5" or "+2.5e1" beside the axis.
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-9, 12),
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    # Names may hold a dollar sign, which is not the start of a formula.
    "text.parse_math": False,
    # Letters as outlines look the same on every machine; the salt makes equal data give equal bytes.
    "svg.fonttype": "path",
    "svg.hashsalt": "ordmoe",
}


@dataclass(frozen=True)
class Plot:
    """A figure to be drawn.

    Args:
        name (`str`): stem of the file beside the page.
        alt (`str`): what it shows, for those who cannot see it.
        caption (`str`): how to read it.
        draw (`Callable`): fills an empty matplotlib `Figure`, whose width is set; it sets the height itself.
        is_wide (`bool`, defaults to `False`): take the page's whole width, and be drawn narrow for phones besides.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Any], None]
    is_wide: bool = False


def require_matplotlib() -> None:
    """Ask for matplotlib before any work is done.

    Raises:
        [`OrdMoEConfigError`]: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OrdMoEConfigError(
            "A report needs matplotlib, which is not installed: pip install 'ordmoe-peft[report]'."
        ) from error


def render(plot: Plot, directory: Path, is_for_phones: bool = False) -> str:
    """Draw the figure, leave it in `directory` as a PNG unless it is for phones, and return an SVG's data address."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        width = WIDE if plot.is_wide and not is_for_phones else NARROW
        figure = Figure(figsize=(width, 3.3), layout="constrained")
        plot.draw(figure)
        # Labels are placed once, for both files: it takes longer than all the rest.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        if not is_for_phones:
            figure.savefig(directory / f"{plot.name}.png", dpi=160)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def line_plot(name: str, title: str, panels: Mapping[str, Lines], xlabel: str, caption: str) -> Plot | None:
    """Panels of lines under each other over one x axis; `None` when no line has a point to draw.

    Args:
        name (`str`), title (`str`), caption (`str`): of the figure.
        panels (mapping): label of the y axis → lines, each a label → values by x. The lines of a single panel get a
            legend; one whose label ends in [`HELD_OUT`] looks like the other of that name, but hollow.
        xlabel (`str`): label of the x axis.
    """
    panels = {ylabel: {label: _finite(line) for label, line in lines.items()} for ylabel, lines in panels.items()}
    panels = {ylabel: lines for ylabel, lines in panels.items() if any(line.notna().any() for line in lines.values())}
    if not panels:
        return None

    def draw(figure: Any) -> None:
        if len(panels) > 1:
            figure.set_figheight(0.9 + 1.55 * len(panels))
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (ylabel, lines) in zip(rows, panels.items(), strict=True):
            _draw_lines(axes, lines)
            axes.set_ylabel(ylabel)
        rows[0].set_title(title)
        rows[-1].set_xlabel(xlabel)
        figure.align_ylabels(rows)
        if len(panels) == 1:
            legend(figure, rows[0])

    alt = f"{title}, by {xlabel}: {'; '.join(panels)}"
    if len(panels) == 1:
        (lines,) = panels.values()
        alt += ", for " + ", ".join(label for label, line in lines.items() if line.notna().any())
    return Plot(name, f"{alt}.".replace("\n", " "), caption, draw)


def by_tier(values: pd.Series) -> pd.DataFrame:
    """A column for each tier, from lists with a number per tier; short lists leave gaps."""
    rows = [{f"tier {tier}": value for tier, value in enumerate(row, start=1)} for row in values]
    return pd.DataFrame(rows, index=values.index)


def _finite(line: pd.Series) -> pd.Series:
    numbers = line.astype(float)
    return numbers.where(numbers.abs() < math.inf)


def _draw_lines(axes: Any, lines: Lines) -> None:
    """Lines with a marker at about a dozen of their points; missing values leave gaps."""
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(label.removesuffix(HELD_OUT) for label, _ in lines.items()))
    drawn = {label: line for label, line in lines.items() if line.notna().any()}
    for label, line in drawn.items():
        style, is_hollow = names.index(label.removesuffix(HELD_OUT)), label.endswith(HELD_OUT)
        color = COLORS[style % len(COLORS)]
        axes.plot(
            line.index,
            line,
            label=label,
            color=color,
            linestyle=":" if is_hollow else LINES[style % len(LINES)],
            marker=MARKERS[style % len(MARKERS)],
            markerfacecolor="white" if is_hollow else color,
            # A value between two gaps is a marker and nothing else.
            markevery=max(1, len(line) // 12) if line.notna().all() else 1,
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    points = pd.concat(list(drawn.values()))
    first, last = points.index.min(), points.index.max()
    pad = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - pad, last + pad)
    if points.min() > -ROUNDING:
        # From 0, with room for the markers at either end.
        top = max(points.max(), SMALLEST_SPAN) if points.max() > ROUNDING else 1
        axes.set_ylim(-0.05 * top, 1.1 * top)
    widen(axes, "y")


def widen(axes: Any, axis: str) -> None:
    """Let an axis, `"x"` or `"y"`, span [`SMALLEST_SPAN`] at least: rounding is drawn as the flat line that it is."""
    low, high = getattr(axes, f"get_{axis}lim")()
    missing = SMALLEST_SPAN - (high - low)
    if missing > 0:
        getattr(axes, f"set_{axis}lim")(low - missing / 2, high + missing / 2)


def named_rows(figure: Any, names: Sequence[str]) -> tuple[Any, list[float]]:
    """Axes with a row for each name, which stands above it, and the rows' positions, in lines of text from the top."""
    names = [wrap(name, 40) for name in names]
    lines = [name.count("\n") + 1 for name in names]
    ends = list(accumulate(count + 1.7 for count in lines))
    figure.set_figheight(1.5 + 0.18 * ends[-1])
    axes = figure.add_subplot()
    places = [end - 1.5 - count / 2 for end, count in zip(ends, lines, strict=True)]
    # Inside the axes, and nothing shines through.
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.set_yticks(places, names, ha="left", va="center", bbox=ground)
    axes.tick_params(axis="y", length=0, pad=-5)
    axes.set_ylim(ends[-1] + 0.2, 0)
    axes.grid(False, axis="y")
    return axes, [end - 0.8 for end in ends]


def legend(figure: Any, axes: Any, is_needed: bool = False) -> None:
    """A legend under the axes, where it hides nothing, in as few rows as fit; the figure grows by its height.

    A single entry is left out, unless it `is_needed`.
    """
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2 and not is_needed:
        return
    # A letter is about 0.085 inches at this size, a line sample with its gaps 0.75.
    fitting = max(1, int(figure.get_figwidth() / (0.085 * max(map(len, labels)) + 0.75)))
    rows = math.ceil(len(labels) / fitting)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.22 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))


def wrap(text: str, width: int) -> str:
    """Text in lines, broken at spaces and after commas, which part the settings in a cell's name."""
    return "\n".join(textwrap.wrap(re.sub(r",\s*", ", ", text), width, break_on_hyphens=False)) or text
