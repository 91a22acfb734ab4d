import pandas as pd
import pytest

from ordmoe_peft.tools.tables import Table, is_number, markdown, number, numbers, percent, plain, signed


def test_cells_are_shown_by_their_columns_formats_and_values_stay_unrounded():
    frame = pd.DataFrame({"tier": [1, 2], "share": [0.12345, None], "masses": [[0.5, 0.25], []]})
    table = Table("Title", frame, {"share": percent, "masses": numbers})
    assert table.texts().to_numpy().tolist() == [["1", "12.3 %", "0.500 / 0.250"], ["2", "—", "—"]]
    assert table.frame["share"][0] == 0.12345


def test_a_name_may_stand_twice_and_a_table_may_be_empty():
    table = Table("Title", pd.DataFrame([[0.5, 1]], columns=["tier", "tier"]), {"tier": percent})
    assert table.texts().to_numpy().tolist() == [["50.0 %", "100.0 %"]]
    assert list(Table("Title", pd.DataFrame({"x": []}), {"x": number}).texts().columns) == ["x"]


def test_formats_may_be_given_in_turn():
    frame = pd.DataFrame([[1, 0.5]], columns=["tier", "tier"])
    assert Table("Title", frame, [plain, percent]).texts().to_numpy().tolist() == [["1", "50.0 %"]]


def test_markdown_escapes_what_would_be_a_column():
    title, _, head, rule, row, _, note = markdown("Title", ["name", "x"], [["a|b", "1"]], ["One seed."]).splitlines()
    assert (title, note) == ("Title", "- One seed.")
    assert row == r"| a\|b | 1 |"
    assert head.count("|") == rule.count("|") == row.replace(r"\|", "").count("|")


def test_a_table_in_markdown_is_what_people_see():
    table = Table("Title", pd.DataFrame({"tier": [1], "share": [0.5]}), {"share": percent})
    assert table.markdown() == "Title\n\n| tier | share |\n| --- | --- |\n| 1 | 50.0 % |\n\n"


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, "1"])
def test_what_is_no_number_is_a_dash(value):
    assert not is_number(value)
    assert (number(value), signed(value), percent(value), numbers([value])) == ("—",) * 4


def test_numbers_and_other_values():
    assert (number(-1.23456), number(1.23456, 1), signed(0.5), percent(0.917)) == ("-1.235", "1.2", "+0.500", "91.7 %")
    assert [plain(value) for value in (None, float("nan"), [], ["a", 1], 0.01, True)] == [
        *("—", "—", "—", "a, 1", "0.01", "True")
    ]
