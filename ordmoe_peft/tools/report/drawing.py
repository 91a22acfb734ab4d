"""Drawing: how every figure of a report looks, and how it gets into the page and into a file beside it.

matplotlib is an extra and is imported here, on use, through its object interface: no pyplot, no state left behind.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import OrdMoEConfigError
from . import page


# Inches. A narrow figure fills a phone at almost 1×, so its letters stay as large as they were drawn.
NARROW, WIDE = 4.4, 9.4
FONT_POINTS = 10.6
# Okabe and Ito's colours, told apart with any colour vision; line and marker repeat the difference.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
BLUE, VERMILION, GREEN = COLORS[:3]
GREY = "#6b6f76"
RC = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_POINTS,
    "axes.titlesize": FONT_POINTS + 0.6,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": FONT_POINTS,
    "xtick.labelsize": FONT_POINTS,
    "ytick.labelsize": FONT_POINTS,
    "legend.fontsize": FONT_POINTS,
    "legend.frameon": False,
    # Inches around the axes: a tick label that grows by a digit after the layout still has room.
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.07,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    # Names may hold a dollar sign, which is not the start of a formula.
    "text.parse_math": False,
    # Letters as outlines look the same on every machine; the salt makes equal data give equal bytes.
    "svg.fonttype": "path",
    "svg.hashsalt": "ordmoe",
}


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


@dataclass(frozen=True)
class Plot:
    """A figure to be drawn.

    Args:
        name (`str`): stem of the file beside the page.
        alt (`str`): what it shows, for those who cannot see it.
        caption (`str`): how to read it.
        draw (`Callable`): fills an empty matplotlib `Figure`, whose width is set; it sets the height itself.
        is_wide (`bool`, defaults to `False`): take the page's whole width where there is room, and be drawn a second
            time for narrow screens.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Any], None]
    is_wide: bool = False


def prepare(directory: Any) -> Path:
    """The report's folder, made if needed, once it is known that the report can be drawn."""
    require_matplotlib()
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    return path


def draw(plots: Iterable[Plot | None], directory: Path) -> str:
    """Draw each figure, leave it beside the page as a PNG, and return all as HTML. None stands for no data."""
    return page.figures([_draw(plot, directory) for plot in plots if plot is not None])


def _draw(plot: Plot, directory: Path) -> str:
    image = _render(plot, WIDE if plot.is_wide else NARROW, directory / f"{plot.name}.png")
    return page.figure(image, _render(plot, NARROW) if plot.is_wide else None, plot.alt, plot.caption)


def _render(plot: Plot, width: float, png: Path | None = None) -> str:
    """One drawing as a data address, and as a PNG if a path is given."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, 3.3), layout="constrained")
        plot.draw(figure)
        # Labels are placed once, for both files: it takes longer than all the rest.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        if png is not None:
            figure.savefig(png, dpi=160)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Series:
    """A named line. `style` chooses colour, marker and line; `is_hollow` marks a second measurement of the same."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: int = 0
    is_hollow: bool = False


def panel(axes: Any, series: Sequence[Series], ylabel: str, xlabel: str | None = None) -> None:
    """Lines with a marker at about a dozen of their points; missing values leave gaps."""
    from matplotlib.ticker import MaxNLocator

    for one in series:
        color = COLORS[one.style % len(COLORS)]
        y = [value if page.is_number(value) else float("nan") for value in one.y]
        axes.plot(
            one.x,
            y,
            label=one.label,
            color=color,
            linestyle=":" if one.is_hollow else LINES[one.style % len(LINES)],
            marker=MARKERS[one.style % len(MARKERS)],
            markerfacecolor="white" if one.is_hollow else color,
            # A value between two gaps is a marker and nothing else.
            markevery=1 if any(map(math.isnan, y)) else max(1, len(y) // 12),
        )
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    if xlabel:
        axes.set_xlabel(xlabel)
    first, last = (end(x for one in series for x in one.x) for end in (min, max))
    pad = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - pad, last + pad)
    values = [value for one in series for value in one.y if page.is_number(value)]
    if min(values) >= 0:
        # From 0, with room for the markers at either end.
        top = max(values) or 1
        axes.set_ylim(-0.05 * top, 1.1 * top)


def legend(figure: Any, axes: Any, is_needed: bool = False) -> None:
    """A legend under the axes, where it hides nothing, in as few rows as fit; the figure grows by its height.

    A single entry is left out, unless it `is_needed`.
    """
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2 and not is_needed:
        return
    widest = max(map(len, labels))
    # A letter is about 0.085 inches at this size, a line sample with its gaps 0.75.
    fitting = max(1, int(figure.get_figwidth() / (0.085 * widest + 0.75)))
    rows = math.ceil(len(labels) / fitting)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.22 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))


def line_plot(name: str, title: str, series: Sequence[Series], ylabel: str, xlabel: str, caption: str) -> Plot | None:
    """A plot of one panel; None when no series has a point to draw."""
    series = [one for one in series if any(map(page.is_number, one.y))]
    if not series:
        return None

    def fill(figure: Any) -> None:
        axes = figure.add_subplot()
        panel(axes, series, ylabel, xlabel)
        axes.set_title(title)
        legend(figure, axes)

    alt = f"{title}: {ylabel} by {xlabel}, for {', '.join(one.label for one in series)}."
    return Plot(name, alt, caption, fill)


def stacked_plot(
    name: str, title: str, panels: Sequence[tuple[str, Sequence[Series]]], xlabel: str, caption: str
) -> Plot | None:
    """Panels of different units under each other over one x axis; None when there is nothing to draw."""
    panels = [(ylabel, [one for one in series if any(map(page.is_number, one.y))]) for ylabel, series in panels]
    panels = [(ylabel, series) for ylabel, series in panels if series]
    if not panels:
        return None

    def fill(figure: Any) -> None:
        figure.set_figheight(0.9 + 1.55 * len(panels))
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (ylabel, series) in zip(rows, panels, strict=True):
            panel(axes, series, ylabel)
            if len(series) > 1:
                axes.legend(loc="upper left", bbox_to_anchor=(0, 1.02), ncols=len(series), borderaxespad=0.1)
        rows[0].set_title(title)
        rows[-1].set_xlabel(xlabel)
        figure.align_ylabels(rows)

    alt = f"{title}, by {xlabel}: {'; '.join(ylabel for ylabel, _ in panels)}.".replace("\n", " ")
    return Plot(name, alt, caption, fill)
