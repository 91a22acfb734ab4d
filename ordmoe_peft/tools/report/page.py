"""The page: sections of figures and tables in HTML that stands alone. Its template is `page.html.j2`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from ...files import write_whole
from ...monitoring.diagnostics import Finding
from ..tables import MISSING, Table
from .drawing import Plot, render, require_matplotlib


NAME = "report.html"
NUMBER = re.compile(rf"[+-]?\d.{{0,26}}|{MISSING}")
# A box that stands out: label, text and mood, which is "good", "bad" or "". The label says the mood in words.
Note = tuple[str, str, str]
Findings = Sequence[Finding | Mapping[str, str]] | None


@dataclass(frozen=True)
class Section:
    """A heading and what belongs to it; left out where there is nothing.

    Args:
        title (`str`): the heading.
        plots (sequence of `Plot` or `None`): figures side by side where there is room; `None` stands for no data.
        tables (sequence of [`Table`]): below them; those without rows are left out.
        folded (sequence of [`Table`]): below those, opened on request by their title.
    """

    title: str
    plots: Sequence[Plot | None] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()


def write_page(
    directory: str | Path,
    title: str,
    lead: str,
    sections: Sequence[Section],
    notes: Sequence[Note] = (),
    findings: Findings = None,
) -> Path:
    """Write `report.html` and a PNG of each figure to `directory`, made if needed, and return the page's path.

    Args:
        directory (`str` or `Path`): the folder.
        title (`str`): for the tab and the first heading.
        lead (`str`): text under the heading: what was measured, on what.
        sections (sequence of [`Section`]): the rest of the page.
        notes (sequence of `Note`): boxes above it.
        findings (sequence of [`~ordmoe_peft.monitoring.diagnostics.Finding`], *optional*): failure signatures, or
            mappings with their `name`, `message` and `severity`. An empty sequence says that none showed, None that
            nobody looked.

    Raises:
        [`OrdMoEConfigError`]: matplotlib is not installed.
    """
    require_matplotlib()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["column_kind"] = column_kind
    environment.filters["image"] = partial(render, directory=directory)
    html = environment.get_template("page.html.j2").render(
        title=title, lead=lead, notes=notes, findings=findings, sections=sections
    )
    write_whole(directory / NAME, html)
    return directory / NAME


def column_kind(cells: Sequence[str]) -> str:
    """What a column holds: numbers, short texts, or texts that may be broken into lines."""
    if all(map(NUMBER.fullmatch, cells)):
        return "number"
    # Prose wraps; numbers in a row, and a path or a name, are easier to read, and to copy, whole.
    is_prose = any(" " in cell and any(map(str.isalpha, cell)) for cell in cells)
    return "text" if max(map(len, cells)) > (24 if is_prose else 60) else "short"
