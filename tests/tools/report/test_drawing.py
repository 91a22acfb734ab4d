"""Whether a report's figures can be read."""

import itertools

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ordmoe_peft.tools.report import drawing
from ordmoe_peft.tools.report.drawing import HELD_OUT, by_tier, line_plot, named_rows, render
from tests.tools.report.pages import LARGE, REPORTS, visible_texts


# CSS pixels that a figure gets on a phone of 390: the page's margins and the figure's border off.
PHONE = 356


@pytest.mark.parametrize("name", LARGE)
def test_labels_of_large_figures_are_legible_and_apart(name, tmp_path, drawn):
    """48 layers, 256 experts, 5 tiers, 30 cells of long names, on a desktop and on a phone."""
    LARGE[name](tmp_path)
    assert drawn
    for figure in drawn:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
        texts = visible_texts(figure)
        # A narrow figure is scaled to a phone's width; a wide one is not shown there.
        scale = min(1.0, PHONE / (drawing.NARROW * 96)) if figure.get_figwidth() == drawing.NARROW else 1.0
        assert all(label.get_fontsize() * scale >= 8.9 for label in texts)
        boxes = [label.get_window_extent(renderer) for label in texts]
        frame = figure.bbox.padded(1)
        for label, box in zip(texts, boxes, strict=True):
            inside = frame.x0 <= box.x0 and frame.y0 <= box.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1
            assert inside, (figure, label)
        for (first, one), (second, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            assert not one.padded(-1).overlaps(other.padded(-1)), (first, second)


@pytest.mark.parametrize("name", REPORTS)
def test_every_axis_is_named(name, tmp_path, drawn):
    REPORTS[name][0](tmp_path)
    for axes in itertools.chain.from_iterable(figure.axes for figure in drawn):
        is_colour_bar = axes.get_label() == "<colorbar>"
        has_categories = any(label.get_text().isidentifier() is False for label in axes.get_yticklabels())
        shares_x = not axes.get_subplotspec().is_last_row() if axes.get_subplotspec() else False
        assert axes.get_xlabel() or shares_x
        assert axes.get_ylabel() or has_categories or is_colour_bar


def test_a_line_held_out_looks_like_its_own_in_training(tmp_path, drawn):
    """Tier 2 was logged on held-out data alone, and keeps its colour; what is missing leaves a gap."""
    nothing = pd.Series(dtype=float)
    lines = {
        "tier 1": pd.Series([1.0, None, float("inf"), 2.0]),
        f"tier 1{HELD_OUT}": pd.Series([1.5], index=[3]),
        "tier 2": nothing,
        f"tier 2{HELD_OUT}": pd.Series([0.5], index=[3]),
    }
    render(line_plot("name", "Title", {"unit": lines}, "step", "Caption."), tmp_path)
    first, first_held_out, second_held_out = drawn[0].axes[0].lines
    assert first.get_color() == first_held_out.get_color() != second_held_out.get_color()
    assert first_held_out.get_markerfacecolor() == "white" != first.get_markerfacecolor()
    assert pd.isna(first.get_ydata()).tolist() == [False, True, True, False]
    assert line_plot("name", "Title", {"unit": {"tier 2": nothing}}, "step", "Caption.") is None


@pytest.mark.parametrize(
    ("values", "view"),
    [
        ([0.0, 1.1e-17, -3e-18], (-0.05, 1.1)),
        ([2e-5, 3e-5, 4e-5], (-5e-5, 1.1e-3)),
        ([-25.0000001, -25.0000002, -25.0000003], (-25.0005, -24.9995)),
        ([3e7, 2e7, 1e7], (-1.5e6, 3.3e7)),
    ],
)
def test_rounding_is_drawn_flat_and_numbers_stand_as_they_are(values, view, tmp_path, drawn):
    render(line_plot("name", "Title", {"unit": {"line": pd.Series(values)}}, "step", "Caption."), tmp_path)
    axis = drawn[0].axes[0].yaxis
    assert axis.get_view_interval() == pytest.approx(view, abs=1e-6)
    assert axis.get_offset_text().get_text() == ""
    assert not any("e" in label.get_text() for label in axis.get_ticklabels())


def test_names_of_rows_stand_above_them(tmp_path, drawn):
    figure = Figure(figsize=(drawing.NARROW, 1))
    axes, rows = named_rows(figure, ["one", "a=1234567890123456,b=1234567890123456,c=12345678901234567", "two"])
    names = axes.get_yticks()
    assert all(name < row for name, row in zip(names, rows, strict=True))
    assert all(row < name for row, name in zip(rows, names[1:], strict=False))
    assert [label.get_text().count("\n") for label in axes.get_yticklabels()] == [0, 1, 0]


def test_tiers_that_a_layer_does_not_have_are_missing():
    frame = by_tier(pd.Series([[0.5, 0.25], [0.75]], index=[0, 4]))
    assert list(frame) == ["tier 1", "tier 2"]
    assert frame["tier 2"].isna().tolist() == [False, True]
    assert by_tier(pd.Series([[], []])).empty
