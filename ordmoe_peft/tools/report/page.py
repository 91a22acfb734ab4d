"""The page: HTML that stands alone, from text that is not trusted. Every function escapes what it is given."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...files import write_whole


NAME = "report.html"
MISSING = "—"
MINUS = "\u2212"
# Figures keep a white ground in both schemes: their colours were chosen for it.
STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5a6068; --ground: #fbfbfa; --box: #fff; --line: #d8dadd;
  --good: #00694d; --bad: #a84300; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e3; --soft: #a9adb3; --ground: #17181a; --box: #202225;
  --line: #3b3e43; --good: #4fd0a5; --bad: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1.5rem 1rem 4rem; color: var(--text); background: var(--ground);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; max-width: 75ch; }
.soft, figcaption { color: var(--soft); }
.note { border-left: 5px solid var(--line); background: var(--box); padding: .5rem .9rem; margin: .6rem 0; }
.note.good { border-color: var(--good); } .note.bad { border-color: var(--bad); }
.note b { color: inherit; } .note.good > b { color: var(--good); } .note.bad > b { color: var(--bad); }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); }
figure:not(.wide) img { max-width: 545px; }
figcaption { font-size: .9rem; margin-top: .3rem; }
.scroll { overflow-x: auto; margin: .6rem 0; border: 1px solid var(--line); border-radius: 6px;
  background: var(--box); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
tr:last-child td { border-bottom: 0; } td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
.short { white-space: nowrap; }
td.text { min-width: 11rem; max-width: 26rem; overflow-wrap: anywhere; white-space: pre-wrap; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def page(title: str, lead: str, *parts: str) -> str:
    """The whole document.

    Args:
        title (`str`): plain text, for the tab and the first heading.
        lead (`str`): plain text under the heading: what was measured, on what.
        parts (`str`): HTML, from the other functions of this module.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p>\n' + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def write_page(directory: Path, html: str) -> Path:
    path = directory / NAME
    write_whole(path, html)
    return path


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it; nothing at all when every part is empty."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts) if any(parts) else ""


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(label: str, text: str, mood: str = "") -> str:
    """A box that stands out; `mood` is "good", "bad" or nothing, and never the only sign: `label` says it in words."""
    return f'<div class="note {mood}"><b>{escape(label)}</b> {escape(text)}</div>'


def findings(found: Sequence[Mapping[str, str]] | None) -> str:
    """Named failure signatures, warnings first. None: nobody looked for them, so nothing is said."""
    if found is None:
        return ""
    if not found:
        return section("Findings", note("None.", "No known failure signature showed.", "good"))
    ordered = sorted(found, key=lambda finding: finding.get("severity") != "warning")
    return section("Findings", *map(_finding, ordered))


def _finding(finding: Mapping[str, str]) -> str:
    is_warning = finding.get("severity") == "warning"
    label = f"{'Warning' if is_warning else 'Note'}: {finding['name'].replace('_', ' ')}."
    return note(label, finding["message"], "bad" if is_warning else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in a box of its own that scrolls sideways. Numbers are to be formatted before, by [`number`].

    A column is set to the right when all of its cells are numbers or missing; cells of long text wrap.
    """
    if not rows:
        return ""
    are_numbers = [all(_is_numeric(row[index]) for row in rows) for index in range(len(columns))]
    head = "".join(
        f'<th scope="col"{_cell_class(column, is_number)}>{escape(column)}</th>'
        for column, is_number in zip(columns, are_numbers, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(value, flag) for value, flag in zip(row, are_numbers, strict=True)) + "</tr>"
        for row in rows
    )
    # A box that scrolls must be reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(value: Any, is_number: bool) -> str:
    return f"<td{_cell_class(str(value), is_number)}>{escape(str(value))}</td>"


def _cell_class(text: str, is_number: bool) -> str:
    if is_number:
        return ' class="number"'
    # Prose wraps; numbers in a row, and a path or a name, are easier to read, and to copy, whole.
    is_prose = " " in text and any(map(str.isalpha, text))
    return ' class="text"' if len(text) > (24 if is_prose else 60) else ' class="short"'


def _is_numeric(value: Any) -> bool:
    text = str(value)
    return text == MISSING or (len(text) < 28 and text.removeprefix("+").removeprefix(MINUS)[:1].isdigit())


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values as a table of two columns."""
    return table(("setting", "value"), [(name, _plain(value)) for name, value in values.items()])


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or MISSING
    return MISSING if value is None else str(value)


def folded(title: str, content: str) -> str:
    """Content that opens on request."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def figure(image: str, narrow_image: str | None, alt: str, caption: str) -> str:
    """An image, given as a data address, with its caption; another drawing of it for narrow screens if there is one."""
    source = f'<source media="(max-width: 700px)" srcset="{escape(narrow_image)}">' if narrow_image else ""
    is_wide = ' class="wide"' if narrow_image else ""
    return (
        f'<figure{is_wide}><picture>{source}<img src="{escape(image)}" alt="{escape(alt)}"></picture>\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def figures(drawn: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>" if drawn else ""


def is_number(value: Any) -> bool:
    """Whether it can be drawn: a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3, signed: bool = False) -> str:
    """A number for people, with a true minus sign; a dash for what is missing or not finite."""
    if not is_number(value):
        return MISSING
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)


def percent(value: Any, digits: int = 1) -> str:
    return f"{number(100 * value, digits)} %" if is_number(value) else MISSING
