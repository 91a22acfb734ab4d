"""Files that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Within the block, write to the path given; at its end the file takes the name `path`, its folders made.

    So a process killed on the way leaves what was there before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A leading dot keeps readers of the folder from it; the number keeps processes that share the folder apart.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    yield unfinished
    os.replace(unfinished, path)


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Within the block, write to the folder given; at its end it takes the name `path`, which may be an empty folder.

    What an error leaves behind is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
