import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.files import check_place, exchange, finish_files, finite, whole_files, whole_folder, write_whole


# Above the largest number that Linux gives a process (2²²), so none has it.
NO_PROCESS = 2**22 + 1


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "results.json"
    write_whole(path, "λ\n")
    write_whole(str(path), "C = 3\n")
    assert path.read_text(encoding="utf-8") == "C = 3\n"
    assert list(path.parent.iterdir()) == [path]


def test_numbers_that_are_not_finite_are_none_at_any_depth():
    data = {"a": [1.5, float("nan"), (float("inf"), "NaN")], "b": {"c": float("-inf"), "d": 2, "e": True, "f": None}}
    assert finite(data) == {"a": [1.5, None, [None, "NaN"]], "b": {"c": None, "d": 2, "e": True, "f": None}}


def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, "first")
    whole = Path.write_text

    def killed(self, text, **options):
        whole(self, text[:2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "is_folder", "message"),
    [
        ("folder", False, "--o .*folder is a folder: give a file's name"),
        ("file", True, "--o .*file is a file: give a folder's name"),
        ("file/x/y", True, "--o .*y cannot be made: .*file is a file"),
        ("locked/x/y", False, "no permission to write to .*locked"),
        ("locked", True, "no permission to write to .*locked"),
        ("folder/x/y", True, None),
        ("file", False, None),
    ],
)
def test_a_place_is_looked_at_before_there_is_something_to_write(place, is_folder, message, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("folder", "locked"):
        (tmp_path / name).mkdir()
    # Whoever runs the tests may be allowed to write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    with pytest.raises(OrdMoEConfigError, match=message) if message else nullcontext():
        check_place(tmp_path / place, "--o", is_folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "locked"]


def test_a_folder_gets_its_name_at_its_end(tmp_path):
    path = tmp_path / "deep" / "merged"
    with whole_folder(path) as unfinished:
        (unfinished / "config.json").touch()
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["config.json"]
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [folder.name for folder in tmp_path.iterdir()] == ["deep"]


def test_a_folder_takes_the_place_of_another_in_one_step(tmp_path):
    path = tmp_path / "plain"
    for content in ("old", "new"):
        with whole_folder(path, replace=True) as unfinished:
            (unfinished / content).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["plain"]


def test_a_folder_that_cannot_be_exchanged_stays(tmp_path):
    path = tmp_path / "plain"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(OrdMoEConfigError, match=r"cannot be replaced in one step \(No such file"):
        exchange(tmp_path / "gone", path)
    assert (path / "old").is_file()


def test_files_take_their_places_beside_others(tmp_path):
    (tmp_path / "state.json").touch()
    for content in ("old", "new"):
        with whole_files(tmp_path) as folder:
            (folder / "a").write_text(content)
            (folder / "b").write_text(content)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "b": "new", "state.json": ""}


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_process_killed_while_files_take_their_places(moved, tmp_path, monkeypatch):
    with whole_files(tmp_path) as folder:
        (folder / "a").write_text("old")
        (folder / "b").write_text("old")
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) > 1 + moved:  # the first gives the folder its name
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt) if moved < 2 else nullcontext(), whole_files(tmp_path) as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("new")
    finish_files(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "b": "new"}


def test_a_process_killed_before_that_leaves_what_was_there(tmp_path):
    with whole_files(tmp_path) as folder:
        (folder / "a").write_text("old")
    killed = tmp_path / f"..waiting.{NO_PROCESS}.1.partial"
    killed.mkdir()
    (killed / "a").write_text("ne")
    finish_files(tmp_path)
    assert (tmp_path / "a").read_text() == "old"
    with whole_files(tmp_path) as folder:
        (folder / "a").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_threads_that_write_to_one_folder_leave_the_files_of_one_of_them(tmp_path):
    def write(content):
        for _ in range(40):
            with whole_files(tmp_path) as folder:
                (folder / "a").write_text(content)
                (folder / "b").write_text(content)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, ["1", "2", "3"]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_process_that_is_writing_keeps_its_folder(tmp_path):
    others = tmp_path / f"..waiting.{os.getppid()}.1.partial"
    others.mkdir()
    with whole_files(tmp_path) as folder:
        (folder / "a").touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == [others.name, "a"]


def test_an_interrupted_save_in_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / ".waiting").mkdir()
    (tmp_path / ".waiting" / "a").touch()

    def replace(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OrdMoEConfigError, match="interrupted, and it cannot be finished.*copy it"):
        finish_files(tmp_path)
