"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` to `path`, its folders made, such that a process killed on the way leaves what was there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A leading dot keeps readers of the folder from it; the number keeps processes that share the folder apart.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
