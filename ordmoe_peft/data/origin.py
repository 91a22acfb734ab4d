"""Where a data set's rows came from: places of rows in files, and what is wrong with a file."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import OrdMoEDataError


# Endings of files that can be read → the builder of `datasets` that reads them.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
GIT_LFS_POINTER = b"version https://git-lfs"
# The first bytes of a Parquet file.
PARQUET = b"PAR1"
# Longest field of a CSV file, in characters: the most that `csv` takes on all systems.
LONGEST_FIELD = 2**31 - 1
KINDS = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Origin:
    """Where rows came from.

    Args:
        name (`str`): the data set's.
        files (sequence of `Path`): those that the rows are in, in order; none where that is not known.
        folder (`Path`, *optional*): where paths of images start; None where that is not known.
    """

    name: str
    files: Sequence[Path] = ()
    folder: Path | None = None

    def place(self, row: int) -> str:
        """Where a row stands, for people: file and line, as far as they are known."""
        of_files = chain.from_iterable((f"{path}, {place}" for place in places(path)) for path in self.files)
        return next(islice(of_files, row, None), f"{self.name}, row {row} (counted from 0)")


def separator(path: Path) -> str:
    """What stands between the fields of a CSV file."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def places(path: Path) -> Iterator[str]:
    """For each row of a file, where it stands in it."""
    if BUILDERS[path.suffix.lower()] == "parquet":
        yield from (f"row {row} (counted from 0)" for row in range(pq.ParquetFile(path).metadata.num_rows))
        return
    rows = json_rows(path) if BUILDERS[path.suffix.lower()] == "json" else _csv_rows(path)
    yield from (place for place, _ in rows)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of JSON lines, or of one list in JSON, each with its place.

    Raises:
        [`OrdMoEDataError`]: names the line that is no JSON, or no object.
    """
    is_list = path.suffix.lower() == ".json" and _first_bytes(path).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    for place, text in [("", _text(path.read_bytes(), path, ""))] if is_list else _lines(path):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, " if is_list else ""
            shown = text if not is_list else text[max(0, error.pos - 40) : error.pos + 40]
            raise OrdMoEDataError(
                f"{_at(path, place)} is not JSON ({where}column {error.colno}: {error.msg}): {_shown(shown)}. Mend or "
                "drop it."
            ) from error
        if not is_list:
            yield place, _object(value, _at(path, place))
            continue
        for row, item in enumerate(value):
            place = f"row {row} (counted from 0)"
            yield place, _object(item, _at(path, place))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    row = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                place = f"line {number} (row {row}, counted from 0)"
                yield place, _text(line, path, place).strip()
                row += 1


def _object(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise OrdMoEDataError(f"{place} is {_shown(value)}: it must be an object with a value for each column.")


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV file, each with its place.

    Raises:
        [`OrdMoEDataError`]: names the line that has another number of fields than the first.
    """
    csv.field_size_limit(LONGEST_FIELD)  # of the process; 131,072 otherwise
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator(path))
        names, row = None, 0
        try:
            for fields in reader:
                place = f"line {reader.line_num} (row {row}, counted from 0)"
                if names is None:
                    names = fields
                elif fields:
                    if len(fields) != len(names):
                        raise OrdMoEDataError(
                            f"{path}, {place} has {len(fields)} fields, and the first line names {len(names)} columns, "
                            f"{', '.join(names)}: {_shown(separator(path).join(fields))}. Put fields that hold a "
                            "separator or a line break in double quotes."
                        )
                    yield place, fields
                    row += 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise OrdMoEDataError(f"{path}, after line {reader.line_num}, is no CSV in UTF-8: {error}.") from error


def check_file(path: Path) -> None:
    """Raise [`OrdMoEDataError`] for a file that cannot hold rows, as far as that can be seen without reading it all.

    CSV files are read, because `datasets` fills up a line that has too few fields.
    """
    kind = BUILDERS.get(path.suffix.lower())
    if kind is None:
        raise OrdMoEDataError(f"{path} ends in {path.suffix!r}. Files that can be read end in {', '.join(BUILDERS)}.")
    first = _first_bytes(path)
    if first.startswith(GIT_LFS_POINTER):
        raise OrdMoEDataError(f"{path} is a pointer of Git LFS, not the data. Run `git lfs pull` where it came from.")
    if not first.strip():
        raise OrdMoEDataError(f"{path} has no samples: the file is empty.")
    if kind == "parquet" and not first.startswith(PARQUET):
        raise OrdMoEDataError(f"{path} is not a Parquet file: it begins with {_shown(first[:20])}.")
    if kind == "csv" and sum(1 for _ in _csv_rows(path)) == 0:
        raise OrdMoEDataError(f"{path} has no samples: only the names of columns.")


def check_lines(path: Path) -> None:
    """Read a file that `datasets` could not read, and say which row is to blame.

    Raises:
        [`OrdMoEDataError`]: names the row.
    """
    if BUILDERS.get(path.suffix.lower()) != "json":
        return
    first_places: dict[str, tuple[str, str]] = {}
    for place, row in json_rows(path):
        for column, value in row.items():
            if _is_half(value):
                raise OrdMoEDataError(
                    f"{path}, {place} has {_shown(value)} in `{column}`: it holds half of a character (a lone "
                    "surrogate, such as \\ud83d). Mend or drop it."
                )
            kind = KINDS.get(type(value))
            before, first_place = first_places.setdefault(column, (kind, place)) if kind else (kind, place)
            if kind != before:
                raise OrdMoEDataError(
                    f"{path}, {place} has {_shown(value)} in `{column}`: that is {kind}, and {first_place} has "
                    f"{before}. Give every row the same kind of value."
                )


def _is_half(value: Any) -> bool:
    """Whether there is text in `value` that no encoding can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _text(line: bytes, path: Path, place: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start} ({line[error.start : error.start + 1]!r})"
        raise OrdMoEDataError(f"{_at(path, place)} is not text in UTF-8: {at}. Save it in UTF-8.") from error


def _at(path: Path, place: str) -> str:
    return f"{path}, {place}" if place else str(path)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
