"""Results as tables for people, and as JSON for programs."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import rich.table
from rich.console import Console

from ..files import finite, write_whole
from ..monitoring.diagnostics import Finding
from ..tools.tables import Table, percent


__all__ = ["percent", "print_findings", "print_table", "print_tables", "write_json"]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a title, the first column to the left, numbers to the right."""
    table = rich.table.Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")  # cut off nothing
    for row in rows:
        table.add_row(*row)
    # Answers and names may hold brackets and colons, which are not markup.
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False, highlight=False)
    # Not the table's own title, which would wrap at the table's width.
    console.print(title, soft_wrap=True)
    console.print(table)


def print_tables(tables: Sequence[Table]) -> None:
    """Print each table with its note."""
    for table in tables:
        print_table(table.title, list(table.frame.columns), table.texts().to_numpy().tolist())
        if table.note:
            print(table.note)


def print_findings(findings: Sequence[Finding]) -> None:
    """A line for each failure signature that shows."""
    for finding in findings:
        print(f"{finding.severity.capitalize()} ({finding.name.replace('_', ' ')}): {finding.message}")


def write_json(path: str, results: Any) -> None:
    """Write results to `path`, its folders made, and say so. Numbers that are not finite become `null`."""
    write_whole(path, json.dumps(finite(results), indent=2, allow_nan=False) + "\n")
    print(f"Results in {path}")
