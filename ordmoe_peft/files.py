"""Files that are there whole or not at all, and what JSON may hold."""

import ctypes
import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id
from typing import Any

from .errors import OrdMoEConfigError


# Where files wait for their places, whole.
_WAITING = ".waiting"
# Of `renameat2`: relative to the working directory; exchange (Linux, `fcntl.h` and `stdio.h`).
_HERE, _EXCHANGE = -100, 2


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Within the block, write to the path given; at its end the file takes the name `path`, its folders made.

    So a process killed on the way leaves what was there before, and so does an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A leading dot keeps readers of the folder from it; the number keeps processes that share the folder apart.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_place(path: str | Path, option: str, is_folder: bool = False) -> None:
    """See that a file can be written at `path`, or a folder, before work is done for it.

    Args:
        path (`str` or `Path`): where; folders on the way are made later.
        option (`str`): what messages call it.
        is_folder (`bool`, defaults to `False`): whether it is to be a folder.

    Raises:
        [`OrdMoEConfigError`]: something is in the way, or may not be written to.
    """
    path = Path(path)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if there == path and path.is_dir() != is_folder:
        kind, wanted = ("folder", "a file's name") if path.is_dir() else ("file", "a folder's name")
        raise OrdMoEConfigError(f"{option} {path} is a {kind}: give {wanted}.")
    if there != path and not there.is_dir():
        raise OrdMoEConfigError(f"{option} {path} cannot be made: {there} is a file.")
    writes = there if there.is_dir() else there.parent  # a file is replaced by one that is written beside it
    if not os.access(writes, os.W_OK | os.X_OK):
        raise OrdMoEConfigError(f"{option} {path} cannot be written: there is no permission to write to {writes}.")


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """Plain data with `None` for numbers that are not finite, which JSON has no names for."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Within the block, write to the folder given; at its end it takes the name `path`, which may be an empty folder.

    What an error leaves behind is removed.

    Args:
        path (`str` or `Path`): the folder's name.
        replace (`bool`, defaults to `False`): let the folder take the place of one that is not empty, in one step.

    Raises:
        [`OrdMoEConfigError`]: the file system cannot exchange two folders.
    """
    path = Path(path)
    with _unfinished(path) as unfinished:
        yield unfinished
        if replace and path.is_dir() and any(path.iterdir()):
            exchange(unfinished, path)  # the earlier one has the unfinished one's name now, and goes with it
        else:
            os.replace(unfinished, path)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A folder beside `path`, of this process's thread, which is removed if it has its name at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{get_native_id()}.partial")
    unfinished.mkdir()
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Give two folders each other's names, in one step. Linux alone has a call for it (`renameat2(2)`).

    Raises:
        [`OrdMoEConfigError`]: the system or the file system cannot do that.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    failed = rename is None or rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    if failed:
        reason = "the system has no call for it" if rename is None else os.strerror(ctypes.get_errno())
        raise OrdMoEConfigError(
            f"{other} cannot be replaced in one step ({reason}), and a process killed between two steps would leave "
            "neither. Remove it first, or choose another folder."
        )


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """Within the block, write files to the folder given; at its end they take their places in `folder`, all or none.

    Other files in `folder` stay. A process killed while files take their places leaves the rest of them in `folder`,
    hidden, and [`finish_files`] goes on; whoever reads such files calls it first. Of several processes or threads that
    write to `folder` the last one's files stay.
    """
    folder = Path(folder)
    for left in folder.glob(f".{_WAITING}.*.partial"):
        if not _is_running(int(left.name.split(".")[3])):  # it was killed before
            shutil.rmtree(left, ignore_errors=True)
    with _unfinished(folder / _WAITING) as unfinished:
        yield unfinished
        _let_wait(unfinished, folder / _WAITING)
    finish_files(folder)


def _let_wait(unfinished: Path, waiting: Path) -> None:
    """Give a folder the name under which [`finish_files`] finds it, after those that other processes left there."""
    while True:
        finish_files(waiting.parent)
        try:
            return os.replace(unfinished, waiting)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def finish_files(folder: str | Path) -> None:
    """Let the files that wait in `folder` take their places; see [`whole_files`].

    Raises:
        [`OrdMoEConfigError`]: there are some, and `folder` cannot be written to.
    """
    waiting = Path(folder, _WAITING)
    with suppress(FileNotFoundError):  # another process does the same
        # Sorted, an adapter's configuration comes before its weights, which nothing reads alone.
        for file in sorted(waiting.iterdir()):
            with suppress(FileNotFoundError):
                _take_place(file, waiting.parent / file.name)
    with suppress(OSError):  # it is gone, or is another process's by now, or empty where nothing can be removed
        waiting.rmdir()


def _take_place(file: Path, place: Path) -> None:
    try:
        os.replace(file, place)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OrdMoEConfigError(
            f"The last save to {place.parent} was interrupted, and it cannot be finished because the folder cannot be "
            "written to. Load it once where it can, or copy it to a folder of your own."
        ) from error
