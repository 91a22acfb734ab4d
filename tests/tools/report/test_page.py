"""What stands in a page, what leaves it, and what it leaves behind."""

import base64
import re
import sys
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pandas as pd
import pytest

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.monitoring.diagnostics import Finding
from ordmoe_peft.tools.measure.correlation import QualityCorrelation, RankCorrelation
from ordmoe_peft.tools.measure.quality import TierMeansByClass, TierTexts
from ordmoe_peft.tools.report import ablate_report, drawing, inspect_report, tiers_report, train_report
from ordmoe_peft.tools.report.page import Section, column_kind, write_page
from ordmoe_peft.tools.tables import Table
from tests.tools.report.pages import HOSTILE, REPORTS, Page, health, log_history, quality, results


def embedded(page: Page) -> list[ElementTree.Element]:
    """Every picture of a page, decoded, those for phones with it."""
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
    assert all("href" not in attributes for _, attributes in page.tags)
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_a_page_fits_narrow_screens(tmp_path):
    """What a phone needs of it, as far as it shows without a browser; `python -m tests.tools.report.look` has one."""
    page = Page(inspect_report(health(), tmp_path))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert not re.search(r"min-width: [4-9]\d\dpx", page.source)
    assert re.search(r"figure img \{[^}]* width: 100%;[^}]* height: auto;", page.source)
    assert re.search(r"\.scroll \{ overflow-x: auto;", page.source)
    # Each table stands in a box of its own that scrolls.
    boxes = [after for (_, box), (after, _) in pairwise(page.tags) if box.get("class") == "scroll"]
    assert boxes == ["table"] * len(page.all("table")) != []
    # The wide figure is drawn again for phones, at their width: letters keep their size.
    *pictures, for_phones = embedded(page)
    assert float(for_phones.get("width")[:-2]) == pytest.approx(drawing.NARROW * 72)
    assert max(float(picture.get("width")[:-2]) for picture in pictures) == pytest.approx(drawing.WIDE * 72)
    assert page.all("source")[0]["media"] == "(max-width: 700px)"


def test_settings_in_a_row_part_at_commas(tmp_path):
    table = Table("Rows", pd.DataFrame({"x": ["grouping=high_only,num_tiers=4"]}))
    page = Page(write_page(tmp_path, "Title", "", [Section("Full", [], [table])]))
    assert "grouping=high_only,<wbr>num_tiers=4" in page.source


def test_text_is_escaped_everywhere(tmp_path, undrawn):
    """Names, prompts, answers and messages come from models, data sets and users."""
    finding = [Finding(HOSTILE, HOSTILE, HOSTILE)]
    empty = RankCorrelation(None, [None] * 4, None)
    tiers = quality(
        model=HOSTILE,
        grouping=HOSTILE,
        tiers=[TierMeansByClass(tier, {HOSTILE: 0.5, "overall": 0.5}) for tier in (1, 2, 3)],
        spearman=QualityCorrelation(empty, empty, HOSTILE, HOSTILE),
        texts=[TierTexts(HOSTILE, HOSTILE, [HOSTILE, "", ""])],
    )
    inspected = health(model=HOSTILE, reasons=[HOSTILE])
    object.__setattr__(inspected.layers[0], "name", HOSTILE)
    ablated = results() | {"metric": HOSTILE, "unit": HOSTILE, "notes": [HOSTILE]}
    ablated["cells"][1] |= {"name": HOSTILE, "settings": {HOSTILE: HOSTILE}, "chosen": {HOSTILE: HOSTILE}}
    pages = [
        train_report(log_history(), {"model_name_or_path": HOSTILE, HOSTILE: [HOSTILE]}, tmp_path / "1", finding),
        inspect_report(inspected, tmp_path / "2"),
        tiers_report(tiers, tmp_path / "3", finding),
        ablate_report(ablated, tmp_path / "4"),
    ]
    for page in map(Page, pages):
        assert page.all("script") == []
        assert all(tag["src"].startswith("data:") for tag in page.all("img"))
        assert HOSTILE in page.text


@pytest.mark.parametrize("as_given", [lambda finding: finding, Finding.to_dict], ids=["finding", "mapping"])
def test_warnings_stand_before_notes(as_given, tmp_path):
    found = [Finding("end_order", "Only by the end.", "note"), Finding("runaway_tier", "Tier 3 fell.")]
    words = Page(write_page(tmp_path, "Title", "", [], findings=list(map(as_given, found)))).text
    assert words.index("Warning: runaway tier. Tier 3 fell.") < words.index("Note: end order. Only by the end.")


def test_no_findings_and_none_looked_for_differ(tmp_path):
    assert "No known failure signature" in Page(write_page(tmp_path, "Title", "", [], findings=())).text
    assert "Findings" not in Page(write_page(tmp_path, "Title", "", [])).text


def test_sections_without_content_are_left_out_and_tables_fold(tmp_path):
    table = Table("Rows", pd.DataFrame({"x": [-1.5]}), note="How to read it.")
    sections = [Section("Empty", [None], [Table("None", pd.DataFrame({"x": []}))]), Section("Full", folded=[table])]
    page = Page(write_page(tmp_path, "Title", "Lead.", sections, [("Good.", "So it is.", "good")]))
    assert page.text.endswith("Title Lead. Good. So it is. Full Rows x -1.5 How to read it. ")
    assert [attributes["class"] for attributes in page.all("td")] == ["number"]
    assert len(page.all("details")) == 1


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["74.700 ± 0.400", "+1.5 [-2.0, 3.0]", "—"], "number"),
        (["C = 3", "—"], "short"),
        (["model.layers.0.mlp.and.some.more"], "short"),
        (["Which shape is in this picture?", "2"], "text"),
    ],
)
def test_kinds_of_columns(cells, kind):
    assert column_kind(cells) == kind


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name, (write, _) in REPORTS.items():
        with pytest.raises(OrdMoEConfigError, match=re.escape("pip install 'ordmoe-peft[report]'")):
            write(tmp_path / name)
        assert not (tmp_path / name).exists()
