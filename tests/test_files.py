from pathlib import Path

import pytest

from ordmoe_peft.files import whole_folder, write_whole


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "results.json"
    write_whole(path, "λ\n")
    write_whole(str(path), "C = 3\n")
    assert path.read_text(encoding="utf-8") == "C = 3\n"
    assert list(path.parent.iterdir()) == [path]


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


def test_a_folder_gets_its_name_at_its_end(tmp_path):
    path = tmp_path / "deep" / "merged"
    with whole_folder(path) as unfinished:
        (unfinished / "config.json").touch()
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["config.json"]
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [folder.name for folder in tmp_path.iterdir()] == ["deep"]
