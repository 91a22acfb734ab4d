"""Tables of results: a tool makes each once, and the terminal and the page show the same."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd


MISSING = "—"


Format = Callable[[Any], str]


@dataclass(frozen=True)
class Table:
    """A table of results.

    Args:
        title (`str`): what it shows, with units.
        frame (`pandas.DataFrame`): its values, unrounded; the index is not shown.
        formats (mapping or sequence): column → function that makes a value a text, [`plain`] for other columns; or a
            function for each column in turn, where a name may stand twice.
        note (`str`): how to read it.
    """

    title: str
    frame: pd.DataFrame
    formats: Mapping[str, Format] | Sequence[Format] = field(default_factory=dict)
    note: str = ""

    def texts(self) -> pd.DataFrame:
        """The cells as people see them."""
        by_column = self.formats
        if isinstance(by_column, Mapping):
            by_column = [by_column.get(name, plain) for name in self.frame.columns]
        columns = [self.frame.iloc[:, place].map(text) for place, text in enumerate(by_column)]
        return pd.concat(columns, axis=1)

    def markdown(self) -> str:
        """The table and its note in Markdown."""
        return markdown(self.title, list(self.frame.columns), self.texts().to_numpy().tolist(), [self.note])


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table with its title and its notes, those that are empty left out, in Markdown."""
    lines = [title, "", _pipes(columns), _pipes(["---"] * len(columns)), *map(_pipes, rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes if note)]) + "\n"


def _pipes(values: Sequence[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> str:
    """A value as it is; parts of a list after commas, a dash for what is missing."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or MISSING
    return MISSING if value is None or value != value else str(value)


def number(value: Any, digits: int = 3, signed: bool = False) -> str:
    """A rounded number; a dash for what is missing or not finite."""
    return f"{value:{'+' if signed else ''}.{digits}f}" if is_number(value) else MISSING


def numbers(values: Any, digits: int = 3) -> str:
    """Rounded numbers in one cell; a dash for none."""
    return " / ".join(number(value, digits) for value in values or ()) or MISSING


def signed(value: Any) -> str:
    return number(value, signed=True)


def percent(share: Any) -> str:
    return f"{number(100 * share, 1)} %" if is_number(share) else MISSING
