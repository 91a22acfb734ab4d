"""Which split of a data set to read, and which of a folder's files are in it."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import OrdMoEDataError


# Words in a file's name or folders → the split that it is in; the words are those of `datasets`.
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def chosen_split(
    name: str, splits: Sequence[str], asked: str | None, defaults: Sequence[str], option: str, is_file: bool = False
) -> str:
    """The split to read: the one that was asked for, else the first of `defaults` that is there, else the only one.

    Args:
        name (`str`): the data set's, for messages.
        splits (sequence of `str`): those that it has.
        asked (`str`, *optional*): as `datasets` takes it, a slice or a sum of splits included.
        defaults (sequence of `str`): in order.
        option (`str`): what chooses a split, for messages.
        is_file (`bool`, defaults to `False`): whether it is a single file.

    Raises:
        [`OrdMoEDataError`]: no such split, or several and none of `defaults`.
    """
    there = ", ".join(map(repr, splits))
    if asked is None:
        found = [split for split in defaults if split in splits] or (list(splits) if len(splits) == 1 else [])
        if not found:
            wanted = " or ".join(map(repr, defaults))
            raise OrdMoEDataError(f"{name} has the splits {there}, and none is called {wanted}. Give {option}.")
        return found[0]
    missing = [split for split in split_names(asked) if split not in splits]
    if missing and is_file:
        raise OrdMoEDataError(
            f"{name} has no split {missing[0]!r}: it is one file, which is one split, {there}. Leave {option} out, or "
            "give a folder with a file for each split, such as train.jsonl and test.jsonl."
        )
    if missing:
        raise OrdMoEDataError(f"{name} has no split {missing[0]!r}; it has {there}. Give {option}, one of these.")
    return asked


def split_names(asked: str) -> list[str]:
    """The splits in what `datasets` reads, e.g. `train[:10%]+test`."""
    return [part.partition("[")[0].strip() for part in asked.split("+")]


def files_by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Splits → their files, in order: by a word of [`WORDS`] in the path; all are `train` where none has one."""
    found: dict[str, list[Path]] = {}
    for path in sorted(files):
        words = re.split(r"[^a-z]+", str(path.relative_to(folder).with_suffix("")).lower())
        split = next((WORDS[word] for word in reversed(words) if word in WORDS), None)
        if split is not None:
            found.setdefault(split, []).append(path)
    return found or {"train": sorted(files)}
