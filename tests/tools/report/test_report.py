"""Reports as a reader gets them: what stands in the page, what leaves it, and whether its figures can be read."""

import base64
import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.report import ablate_report, drawing, inspect_report, tiers_report, train_report
from ordmoe_peft.tools.report.page import MINUS
from tests import models, text
from tests.cli.test_main import error_of, main, save_base, save_data, train_arguments


HOSTILE = "\"><script>alert('x')</script> <img src=http://evil.example/x> & $\\frac{"
VOID = {"meta", "img", "source", "br"}
# CSS pixels that a figure gets on a phone of 390: the page's margins and the figure's border off.
PHONE = 356


class Page(HTMLParser):
    """What a browser sees: tags with their attributes, text without the style, and whether tags are balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if "style" not in self.open:
            self.words.append(words)

    @property
    def text(self) -> str:
        """Words in one line, minus signs as they are typed."""
        return re.sub(r"\s+", " ", " ".join(self.words)).replace(MINUS, "-")

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def log_history(steps: int = 20, num_tiers: int = 3) -> list[dict]:
    """As `trainer.state.log_history`: a line a step, an evaluation, the metrics of the whole run."""
    history = []
    for step in range(1, steps + 1):
        entry = {"loss": 1.0 / step, "ntp_loss": 0.9 / step, "erl_loss": -0.1 * step, "balance_loss": 1.2, "step": step}
        for tier in range(1, num_tiers + 1):
            entry[f"tier_{tier}/log_likelihood"] = -0.05 - (tier - 1) * step
            entry[f"tier_{tier}/log_likelihood_no_eos"] = -0.15 - (tier - 1) * step
        entry |= {"router/drift_overlap": 0.9, "router/drift_kl": 0.01 * step, "router/imbalance": 2.0}
        history.append(entry | {"router/dead_experts": step // 7})
    history.append({"eval_tier_1/log_likelihood": -0.08, "eval_loss": 0.1, "step": steps})
    history.append({"train_runtime": 50.0, "train_steps_per_second": 0.4, "total_flos": 3e12, "step": steps})
    return history


def health(num_layers: int = 4, num_experts: int = 8, num_tiers: int = 3) -> dict:
    def layer(index: int) -> dict:
        experts = num_experts if index % 2 else num_experts // 2
        masses = [0.6 / tier for tier in range(1, num_tiers + 1)]
        return {
            "layer": 2 * index,
            "name": f"model.layers.{2 * index}.mlp",
            "num_experts": experts,
            "top_k": 2,
            "utilisation": [0.001, 2.0, *[1.0] * (experts - 2)],
            "dead": 1,
            "imbalance": 2.0,
            "marginal_entropy": 1.9,
            "token_entropy": 0.8,
            "score_std": 0.4,
            "gate_mass": masses,
            "tier_probability": masses,
            "drift_overlap": 0.9,
            "drift_kl": 0.0123,
        }

    layers = [layer(index) for index in range(num_layers)]
    verdict = {"is_fit": False, "reasons": ["Layer 2 has a dead expert."], "layers": layers}
    return {"model": "some/model", "num_tokens": 12345, "num_tiers": num_tiers, "grouping": "uniform", **verdict}


def quality(num_layers: int = 4, num_tiers: int = 3) -> dict:
    tiers = [
        {
            "tier": tier,
            "log_likelihood": -0.05 * tier,
            "log_likelihood_no_eos": -0.15 * tier,
            "accuracy": {"color": 0.9, "overall": 0.917 / tier, "shape presence": 0.8},
        }
        for tier in range(1, num_tiers + 1)
    ]
    share = {"share": 0.834, "stderr": 0.012, "chance": 1 / 6, "random": 0.171}
    layers = [0.1, None, *[0.3] * (num_layers - 2)]
    return {
        "model": "some/model",
        "num_samples": 1000,
        "num_tiers": num_tiers,
        "grouping": "uniform",
        "tiers": tiers,
        "order": dict.fromkeys(("full", "ends", "full_no_eos", "ends_no_eos"), share),
        "spearman": {
            "within_top": {"overall": 0.123, "layers": layers},
            "pooled": {"overall": None, "layers": [None] * num_layers},
            "quality": "exact match",
            "note": "One layer had no variation.",
        },
        "diversity": [[0.1 * tier for tier in range(num_tiers)]] * num_layers,
        "texts": [{"prompt": "Which shape?", "reference": "circle", "answers": ["a circle", *[""] * (num_tiers - 1)]}],
    }


def results(num_cells: int = 4) -> dict:
    def cell(name: str, mean: float) -> dict:
        difference = {"mean": mean, "low": mean - 0.5, "high": mean + 0.5, "is_gain": mean > 0.5, "verdict": "so"}
        return {
            "name": name,
            "settings": {"erl_coef": 0.1},
            "chosen": {"max_steps": 120},
            "mean": 74.7 + mean,
            "stderr": 0.4,
            "per_seed": [74.1, 75.3],
            "difference": difference,
            "log_likelihood": {"mean": -0.25, "stderr": 0.01, "difference": difference},
            "tier_log_likelihood": [-0.05, -7.2],
            "seconds_per_step": 0.45,
        }

    long = "grouping=high_only,num_tiers=4,advantages=center,rewards=1-0.5-0.25-0,objective=plackett_luce,seed="
    cells = [cell(f"{long}{index}" if index % 3 else f"erl_coef={index}", index % 3 - 1) for index in range(num_cells)]
    first = cell("sft", 0) | {"difference": None, "log_likelihood": None, "tier_log_likelihood": None}
    notes = ["A sweep under zscore is blind."]
    return {"baseline": "sft", "metric": "exact match", "unit": "points", "cells": [first, *cells], "notes": notes}


# Name → (a function of a folder, names of its figures).
REPORTS = {
    "train": (
        lambda folder: train_report(log_history(), {"erl_coef": 0.01, "run_name": None}, folder),
        {"likelihood", "likelihood_no_eos", "tier_1", "losses", "routing"},
    ),
    "inspect": (
        lambda folder: inspect_report(health(), folder),
        {"utilisation", "entropy", "gate_mass", "tier_probability", "score_std", "drift"},
    ),
    "tiers": (
        lambda folder: tiers_report(quality(), folder),
        {"likelihood", "accuracy", "order", "spearman", "diversity"},
    ),
    "ablate": (lambda folder: ablate_report(results(), folder), {"difference", "log_likelihood", "cost"}),
}
LARGE = {
    "inspect": lambda folder: inspect_report(health(48, 256, 5), folder),
    "tiers": lambda folder: tiers_report(quality(48, 5), folder),
    "ablate": lambda folder: ablate_report(results(30), folder),
}


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their pictures, which take longer than all the rest."""
    monkeypatch.setattr(drawing, "_render", lambda plot, width, png=None: "data:image/svg+xml;base64,")


def embedded(page: Page) -> list[ElementTree.Element]:
    """Every picture of a page, decoded."""
    addresses = [tag["src"] for tag in page.all("img")] + [tag["srcset"] for tag in page.all("source")]
    kind = "data:image/svg+xml;base64,"
    assert all(address.startswith(kind) for address in addresses)
    return [ElementTree.fromstring(base64.b64decode(address.removeprefix(kind))) for address in addresses]


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_stands_alone_with_its_figures_and_leaves_no_state(name, tmp_path, monkeypatch):
    """No pyplot, so no window system, no figure that stays open, and no setting of the caller's changed."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    before = matplotlib.rcParams.copy()
    write, figures = REPORTS[name]
    path = write(tmp_path / "deep" / "folder")
    assert dict(matplotlib.rcParams.copy()) == dict(before)
    assert path == tmp_path / "deep" / "folder" / "report.html"
    page = Page(path)
    assert {file.stem for file in path.parent.glob("*.png")} == figures
    assert len(page.all("img")) == len(figures)
    assert all(len(tag["alt"]) > 20 for tag in page.all("img"))
    for picture in embedded(page):
        for element in picture.iter():
            references = [value for key, value in element.attrib.items() if key.endswith("href")]
            assert all(reference.startswith(("#", "data:image/png")) for reference in references)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert {key for _, attributes in page.tags for key in attributes if key in ("src", "srcset", "href")} <= {
        "src",
        "srcset",
    }
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_equal_data_give_equal_pages(tmp_path):
    """A dollar sign in a cell's name is one, not the start of a formula that matplotlib cannot read."""
    named = results(1) | {"baseline": HOSTILE}
    named["cells"][1]["name"] = HOSTILE
    first, second = (ablate_report(named, tmp_path / folder) for folder in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_training_page_says_where_the_run_went(tmp_path, undrawn):
    findings = [
        {"name": "end_order", "message": "Only by the end.", "severity": "info"},
        {"name": "runaway_tier", "message": "Tier 3 fell.", "severity": "warning"},
    ]
    settings = {"erl_coef": 0.01, "run_name": None, "targets": ["router", "experts"]}
    history = [*log_history(), {"train_seconds_per_step": 2.5, "peak_memory_bytes": 3e9}]
    words = Page(train_report(history, settings, tmp_path, findings)).text
    assert words.index("Warning: runaway tier. Tier 3 fell.") < words.index("Note: end order. Only by the end.")
    # First and last in training, last on held-out data.
    assert re.search(r"tier 1 -0\.050 -0\.050 -0\.080 tier 1, without end tokens -0\.150 -0\.150 — ", words)
    assert re.search(r"tier 3 -2\.050 -40\.050 — ", words)
    assert re.search(r"seconds per step 2\.500 .*peak memory \(GB\) 3\.000", words)
    assert re.search(r"erl_coef 0\.01 All other settings \(2\) .*run_name — .*targets router, experts", words)


def test_no_findings_and_none_looked_for_differ(tmp_path, undrawn):
    assert "No known failure signature" in Page(train_report(log_history(), {}, tmp_path, ())).text
    assert "Findings" not in Page(train_report(log_history(), {}, tmp_path)).text


def test_inspection_page_puts_the_verdict_first(tmp_path, undrawn):
    words = Page(inspect_report(health(), tmp_path)).text
    assert (
        words.index("Not fit to be cut into tiers")
        < words.index("Layer 2 has a dead expert.")
        < words.index("Utilisation")
    )
    assert "2 model.layers.2.mlp 8 2 1 2.000 1.900 0.800 0.400 0.600 / 0.300 / 0.200 0.900 0.0123" in words
    words = Page(inspect_report(health() | {"is_fit": True, "reasons": []}, tmp_path)).text
    assert "Tiers can be cut. Whether ranks carry a signal" in words
    assert "Not fit" not in words


def test_tiers_page_has_numbers_and_texts(tmp_path, undrawn):
    words = Page(tiers_report(quality(), tmp_path)).text
    assert "tier log-likelihood (nats) without end tokens overall color shape presence" in words
    assert "1 -0.050 -0.150 91.7 % 90.0 % 80.0 %" in words
    assert "all tiers in order 83.4 % 1.2 % 17.1 % 16.7 %" in words
    assert "0.123 within tier 1, — over all tiers. Quality is exact match. Note. One layer had no variation." in words
    assert "prompt reference tier 1 tier 2 tier 3 Which shape? circle a circle" in words


def test_ablation_page_has_every_cell_and_calls_the_baseline_so(tmp_path, undrawn):
    words = Page(ablate_report(results(), tmp_path)).text
    assert "Note. A sweep under zscore is blind." in words
    assert "sft 74.700 ± 0.400 — baseline — — — 0.45 74.100 / 75.300" in words
    assert "erl_coef=0 73.700 ± 0.400 -1.000 [-1.500, -0.500] so" in words
    assert "chosen on validation" in words


def test_text_is_escaped_everywhere(tmp_path, undrawn):
    """Names, prompts, answers and messages come from models, data sets and users."""
    finding = [{"name": HOSTILE, "message": HOSTILE, "severity": HOSTILE}]
    tiers = quality() | {"model": HOSTILE, "grouping": HOSTILE, "findings": finding}
    tiers["tiers"][0]["accuracy"] = {HOSTILE: 0.5}
    tiers["spearman"] |= {"quality": HOSTILE, "note": HOSTILE}
    tiers["texts"] = [{"prompt": HOSTILE, "reference": HOSTILE, "answers": [HOSTILE, None, ""]}]
    inspected = health() | {"model": HOSTILE, "reasons": [HOSTILE]}
    inspected["layers"][0]["name"] = HOSTILE
    ablated = results() | {"metric": HOSTILE, "unit": HOSTILE, "notes": [HOSTILE]}
    ablated["cells"][1] |= {"name": HOSTILE, "settings": {HOSTILE: HOSTILE}, "chosen": {HOSTILE: HOSTILE}}
    pages = [
        train_report(log_history(), {"model_name_or_path": HOSTILE, HOSTILE: [HOSTILE]}, tmp_path / "1", finding),
        inspect_report(inspected, tmp_path / "2"),
        tiers_report(tiers, tmp_path / "3"),
        ablate_report(ablated, tmp_path / "4"),
    ]
    for page in map(Page, pages):
        assert page.all("script") == []
        assert all(tag["src"].startswith("data:") for tag in page.all("img"))
        assert HOSTILE in page.text


def test_what_is_missing_is_left_out(tmp_path):
    """No adapter, no evaluation, no variation, one layer, one step, one tier, values that are no numbers."""
    bare = health(1)
    bare["layers"][0] |= {"drift_overlap": None, "drift_kl": None, "score_std": float("nan")}
    path = inspect_report(bare, tmp_path / "inspect")
    assert not (path.parent / "drift.png").exists()
    assert not (path.parent / "score_std.png").exists()
    empty = {"overall": None, "layers": [None, None]}
    poor = quality(2, 1) | {"spearman": {"within_top": empty, "pooled": empty, "quality": "rating", "note": None}}
    poor |= {"diversity": [[None], [None]], "texts": [], "order": {"full": {"share": None}}}
    poor["tiers"][0] |= {"log_likelihood_no_eos": None, "accuracy": {}}
    path = tiers_report(poor, tmp_path / "tiers")
    assert {file.stem for file in path.parent.glob("*.png")} == {"likelihood"}
    history = [{"loss": float("nan"), "tier_1/log_likelihood": -1.0, "step": 1}]
    path = train_report(history, {}, tmp_path / "train")
    assert {file.stem for file in path.parent.glob("*.png")} == {"likelihood", "tier_1"}
    Page(train_report([], {}, tmp_path / "nothing"))
    alone = results(0)
    alone["cells"][0] |= {"seconds_per_step": None, "stderr": None, "per_seed": None}
    path = ablate_report(alone, tmp_path / "ablate")
    assert list(path.parent.glob("*.png")) == []
    assert "sft 74.700 ± —" in Page(path).text


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that reports draw, as they are saved."""
    figures = []
    save = Figure.savefig

    def record(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self not in figures:
            figures.append(self)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def visible_texts(figure: Figure) -> list:
    """Titles, labels, legends, values and those tick labels whose ticks are in view."""
    texts = list(figure.texts)
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())):
        texts += legend.get_texts()
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    return [label for label in texts if label.get_text() and label.get_visible()]


@pytest.mark.parametrize("name", LARGE)
def test_labels_of_large_figures_are_legible_and_apart(name, tmp_path, drawn):
    """48 layers, 256 experts, 5 tiers, 30 cells of long names, on a desktop and on a phone."""
    LARGE[name](tmp_path)
    assert drawn
    for figure in drawn:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
        texts = visible_texts(figure)
        # A figure on a phone is scaled to its width; the wide ones have a second drawing for that.
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


def test_the_heat_map_is_centred_on_the_fair_share(tmp_path, drawn):
    inspect_report(health(), tmp_path)
    (image,) = drawn[0].axes[0].images
    assert image.norm(1.0) == 0.5
    assert image.norm(0.0) == 0.0
    shares = image.get_array()
    assert shares.shape == (4, 8)
    # Layers 0 and 2 of the four have 4 experts; the rest of their row is no expert, not an unused one.
    assert shares.mask[0].tolist() == [False] * 4 + [True] * 4
    dead = drawn[0].axes[0].collections[0].get_offsets()
    assert dead.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name, (write, _) in REPORTS.items():
        with pytest.raises(OrdMoEConfigError, match=re.escape("pip install 'ordmoe-peft[report]'")):
            write(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_train_writes_a_report_when_asked(tmp_path, capsys, monkeypatch):
    base = save_base(models.qwen3_moe(), tmp_path / "base")
    data = save_data(text.conversations(), tmp_path / "data")
    folder = tmp_path / "report"
    arguments = train_arguments(base, data, tmp_path / "out", report=folder, logging_steps=1, hub_token="hf_secret")
    assert main(arguments) == 0
    assert f"Report: {folder / 'report.html'}" in capsys.readouterr().out
    page = Page(folder / "report.html")
    assert "2 steps" in page.text
    assert "tier 3, without end tokens" in page.text
    assert "seconds per step" in page.text
    assert "hf_secret" not in page.source
    assert (folder / "likelihood.png").is_file()

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    untrained = train_arguments(base, data, tmp_path / "untrained", report=folder)
    assert "pip install 'ordmoe-peft[report]'" in error_of(capsys, untrained)
    assert not (tmp_path / "untrained").exists()
