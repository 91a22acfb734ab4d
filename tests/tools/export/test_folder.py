"""The folder of an export: new, or an earlier export's, whole at all times."""

import json

import pytest

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.export.folder import EXPORT_NAME, export_folder


def write(output, text="new"):
    with export_folder(output, "peft", output.parent / "adapter") as folder:
        (folder / "weights").write_text(text)
    return {path.name for path in output.iterdir()}


def test_an_earlier_export_is_replaced_whole(tmp_path):
    output = tmp_path / "deep" / "out"
    assert write(output, "old") == {"weights", EXPORT_NAME}
    with pytest.raises(KeyError), export_folder(output, "peft", tmp_path) as folder:
        (folder / "weights").write_text("half")
        raise KeyError
    assert (output / "weights").read_text() == "old"
    with export_folder(output, "other", tmp_path / "adapter") as folder:
        (folder / "others").write_text("new")
    assert {path.name for path in output.iterdir()} == {"others", EXPORT_NAME}
    record = json.loads((output / EXPORT_NAME).read_text())
    assert (record["form"], record["adapter"], record["files"]) == ("other", "adapter", ["others"])
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "beside an export"])
def test_what_is_no_export_is_left_alone(tmp_path, kind):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        if kind == "beside an export":
            write(output)
        output.mkdir(exist_ok=True)
        (output / "notes.txt").write_text("mine")
    with pytest.raises(OrdMoEConfigError, match="out holds notes.txt" if kind != "file" else "out holds out"):
        write(output)
    assert (output if kind == "file" else output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("record", ["{}", "[", '{"files": 3}'])
def test_a_record_that_no_export_wrote(tmp_path, record):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / EXPORT_NAME).write_text(record)
    with pytest.raises(OrdMoEConfigError, match=f"out holds {EXPORT_NAME}, which no earlier export wrote"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / EXPORT_NAME).read_text() == record


def test_through_a_link_and_into_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert write(tmp_path / "link") == write(tmp_path / "link") == {"weights", EXPORT_NAME}
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "weights").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with export_folder(".", "peft", tmp_path) as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "here" / "weights").is_file()
