import json

import pandas as pd

from ordmoe_peft.cli.tables import print_findings, print_table, print_tables, write_json
from ordmoe_peft.monitoring.diagnostics import Finding
from ordmoe_peft.tools.tables import Table, percent


def test_texts_are_printed_as_they_are(capsys):
    """Answers and names may look like markup."""
    print_table("Title [b]", ["name [/i]", "value"], [["[/b] :smile:", "[red]1"]])
    printed = capsys.readouterr().out
    for expected in ("Title [b]", "name [/i]", "[/b] :smile:", "[red]1"):
        assert expected in printed


def test_tables_are_printed_with_their_notes(capsys):
    print_tables([Table("Title", pd.DataFrame({"tier": [1], "share": [0.5]}), {"share": percent}, "How to read it.")])
    printed = capsys.readouterr().out
    assert printed.startswith("Title\n")
    assert "│ 1    │ 50.0 % │" in printed
    assert printed.endswith("How to read it.\n")


def test_findings_and_files(tmp_path, capsys):
    print_findings([Finding("random_level_order", "Tiers are in no order.", "note")])
    write_json(str(tmp_path / "deep" / "results.json"), {"a": 1, "b": [float("nan")]})
    assert capsys.readouterr().out.splitlines() == [
        "Note (random level order): Tiers are in no order.",
        f"Results in {tmp_path / 'deep' / 'results.json'}",
    ]
    assert json.loads((tmp_path / "deep" / "results.json").read_text()) == {"a": 1, "b": [None]}
