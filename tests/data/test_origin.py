"""Files that cannot be read are named with what is wrong in them, and rows with the line that they stand on."""

import json

import pytest
from datasets import Dataset

from ordmoe_peft.data.origin import Origin, check_file, check_lines, json_rows
from ordmoe_peft.errors import OrdMoEDataError


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def complaint(check, file, content) -> str:
    """What `check` says of a file with this content."""
    file.write_bytes(content)
    with pytest.raises(OrdMoEDataError) as error:
        check(file)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", b"a", "ends in '.txt'. Files that can be read end in .jsonl, .json, .csv, .tsv, .parquet"),
        ("data.jsonl", b"\n \n", "has no samples: the file is empty"),
        ("data.jsonl", LFS, "is a pointer of Git LFS, not the data. Run `git lfs pull`"),
        ("data.parquet", LFS, "is a pointer of Git LFS"),
        ("data.parquet", b"prompt,completion", "is not a Parquet file: it begins with b'prompt,completion'"),
        ("data.csv", b"prompt,completion\n", "has no samples: only the names of columns"),
        ("data.csv", b"a,b\n1,2\n1,2,3\n", ", line 3 (row 1, counted from 0) has 3 fields, and the first line names 2"),
        ("data.csv", b'a,b\n"1\n1",2\n\n1\n', ", line 5 (row 1, counted from 0) has 1 fields"),
        ("data.tsv", b"a\tb\n1\t2\t3\n", "line 2 (row 0, counted from 0) has 3 fields"),
        ("data.csv", b"a,b\ncaf\xe9,2\n", "is no CSV in UTF-8"),
    ],
)
def test_files_without_rows(tmp_path, name, content, message):
    said = complaint(check_file, tmp_path / name, content)
    assert said.startswith(f"{tmp_path / name}")
    assert message in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{bad\n', "line 3 (row 1, counted from 0) is not JSON (column 2: Expecting property"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "line 2 (row 1, counted from 0) is [2]: it must be an object"),
        ("a.jsonl", b'{"a": "x"}\n{"a": null}\n{"a": 3}\n', "3 in `a`: that is a number, and line 1 (row 0, counted"),
        ("a.jsonl", b'{"a": "caf\xe9"}\n', "line 1 (row 0, counted from 0) is not text in UTF-8: byte 10 (b'\\xe9')"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "is not JSON (line 2, column 7: Expecting ':' delimiter)"),
        ("a.json", b'[{"a": 1}, 3]', "row 1 (counted from 0) is 3: it must be an object"),
    ],
)
def test_the_line_that_is_to_blame(tmp_path, name, content, message):
    said = complaint(check_lines, tmp_path / name, content)
    assert str(tmp_path / name) in said
    assert message in said


def test_places_of_rows_over_files(tmp_path):
    lines, table, parquet = tmp_path / "a.jsonl", tmp_path / "b.csv", tmp_path / "c.parquet"
    lines.write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    table.write_text('a\n"1\n2"\n3\n')
    Dataset.from_dict({"a": [1]}).to_parquet(parquet)
    origin = Origin("data", [lines, table, parquet])
    assert [origin.place(row) for row in range(6)] == [
        f"{lines}, line 1 (row 0, counted from 0)",
        f"{lines}, line 3 (row 1, counted from 0)",
        f"{table}, line 3 (row 0, counted from 0)",
        f"{table}, line 4 (row 1, counted from 0)",
        f"{parquet}, row 0 (counted from 0)",
        "data, row 5 (counted from 0)",
    ]
    assert Origin("me/data").place(3) == "me/data, row 3 (counted from 0)"


def test_rows_of_a_list_in_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"a": 1}, {"a": "2"}], indent=1))
    assert [row for _, row in json_rows(tmp_path / "a.json")] == [{"a": 1}, {"a": "2"}]
