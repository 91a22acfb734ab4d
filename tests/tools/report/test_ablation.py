from ordmoe_peft.tools.report import ablate_report
from tests.tools.report.pages import HOSTILE, Page, results


def test_equal_data_give_equal_pages(tmp_path):
    """A dollar sign in a cell's name is one, not the start of a formula that matplotlib cannot read."""
    named = results(1) | {"baseline": HOSTILE}
    named["cells"][1]["name"] = HOSTILE
    first, second = (ablate_report(named, tmp_path / folder) for folder in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_ablation_page_has_every_cell_and_calls_the_baseline_so(tmp_path, undrawn):
    words = Page(ablate_report(results(), tmp_path)).text
    assert "Note. A sweep under zscore is blind." in words
    assert "sft 74.700 ± 0.400 — baseline — — — 0.45 74.100 / 75.300" in words
    assert "erl_coef=0 73.700 ± 0.400 -1.000 [-1.500, -0.500] so" in words
    assert "chosen on validation" in words


def test_gains_losses_and_undecided_cells_have_marks_of_their_own(tmp_path, drawn):
    """Differences of -1, 0 and 1 with intervals of half a point to either side."""
    ablate_report(results(3), tmp_path)
    figure = drawn[0]
    (axes,) = figure.axes
    marks = {line.get_marker(): line.get_xdata()[0] for line in axes.lines if line.get_marker() not in ("None", "")}
    assert marks == {"o": 1, "D": 0, "v": -1}
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels == ["gain: interval above 0", "undecided: interval holds 0", "loss: interval below 0"]
    intervals = sorted(tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2)[:3]
    assert (-1.5, -0.5) in intervals
    assert axes.get_xlabel() == "difference in exact match (points)"


def test_beside_likelihood_stands_accuracy(tmp_path, drawn):
    chosen_by = results(1) | {"metric": "log_likelihood", "unit": "nats per token"}
    for cell in chosen_by["cells"]:
        cell["accuracy"] = {"mean": 34.0, "stderr": 1.0, "difference": cell["difference"]}
    page = Page(ablate_report(chosen_by, tmp_path))
    assert [figure.axes[0].get_xlabel() for figure in drawn[:2]] == [
        "difference in log_likelihood (nats per token)",
        "difference in accuracy (%)",
    ]
    assert "accuracy (%)" in page.text and "34.000" in page.text


def test_what_is_missing_is_left_out(tmp_path):
    alone = results(0)
    alone["cells"][0] |= {"seconds_per_step": None, "stderr": None, "per_seed": None}
    path = ablate_report(alone, tmp_path)
    assert list(path.parent.glob("*.png")) == []
    assert "sft 74.700 ± —" in Page(path).text
