from pathlib import Path

import pytest

from ordmoe_peft.files import write_whole


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
