"""Read a data set for any command: a file, a folder or an id on the hub, its images found and its texts looked at."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import datasets
from datasets import Dataset, Image, Json, List, Value, load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

from ..errors import OrdMoEDataError
from .image_paths import COLUMNS, ImageFinder, with_images, with_streamed_images, without_payloads
from .origin import BUILDERS, Origin, check_file, check_lines, json_rows, separator
from .rows import CONVERSATIONS, column_values, text_problem, with_column
from .splits import chosen_split, files_by_split, split_names


# Files in the folder of a data set that was saved by `save_to_disk`, of one split or of several.
SAVED = ("state.json", "dataset_dict.json")
# Columns that CSV readers are to leave as they are: an answer may be 007, or None.
TEXTS = ("prompt", "completion", "text", "messages", "conversations", "image", "images")
# What LLaVA's data has in a text in place of an image.
MARK = "<image>"
# What readers of JSON make of a text such as 2024-05-01 where it stands among texts in other files.
DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def load_data(
    name: str | Path,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    *,
    defaults: Sequence[str] = ("train",),
    option: str = "split",
) -> Any:
    """A split of a data set, ready for training and for every command.

    Columns `image` and `images` that hold paths become images; paths start at the folder of the data file. Images in
    the parts of messages become a column `images`. Every row is seen to have text, in `prompt` and `completion`, or
    `messages`, or `conversations`, or `text`; a stream is looked at as it is read.

    Args:
        name (`str` or `Path`): a file (.jsonl, .json, .csv, .tsv, .parquet); a folder of such files, of images, or
            written by `save_to_disk`; or an id on the hub.
        split (`str`, *optional*): the split; by default the first of `defaults` that is there, else the only one. A
            file is one split, `train`.
        config (`str`, *optional*): the configuration of a folder or id that has several.
        streaming (`bool`, defaults to `False`): read rows as they are needed.
        defaults (sequence of `str`, defaults to `("train",)`): splits to take without `split`.
        option (`str`, defaults to `"split"`): what messages call `split`.

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] with `streaming`.

    Raises:
        [`OrdMoEDataError`]: there is no such data set or split; a file cannot be read; a row has no text, or an image
            that is not there. Names file, line, row (counted from 0), column and value.
    """
    name, path = str(name), Path(name)
    if not name:
        raise OrdMoEDataError("The name of the data set is empty. Give a file, a folder or a hub id.")
    with _quiet():
        if path.is_file():
            check_file(path)
            chosen = chosen_split(name, ["train"], split, defaults, option, is_file=True)
            dataset, origin = _read_files({"train": [path]}, chosen, streaming, name)
        elif path.is_dir():
            dataset, origin = _read_folder(path, split, config, streaming, defaults, option)
        else:
            dataset, origin = _read_from_hub(name, split, config, streaming, defaults, option)
        if streaming:
            return with_streamed_images(dataset, origin)
        if len(dataset) == 0:
            raise OrdMoEDataError(f"The split {dataset.split} of the data set {name} has no samples.")
        try:
            return with_images(_checked_texts(dataset, origin), origin)
        except UnicodeDecodeError as error:
            for path in origin.files:
                check_lines(path)
            raise OrdMoEDataError(f"{name} has text that is not UTF-8: {error}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, `datasets` logs no error beside the one that it raises."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


# ------------------------------------------------------------------------------------------------------------- reading
def _read_files(files: dict[str, list[Path]], split: str, streaming: bool, name: str) -> tuple[Any, Origin]:
    """A split of files of one kind."""
    of_split = {one: files[one] for one in dict.fromkeys(split_names(split))}
    paths = [path for part in of_split.values() for path in part]
    kinds = {BUILDERS[path.suffix.lower()] for path in paths}
    if len(kinds) > 1:
        shown = ", ".join(map(str, paths[:4]))
        raise OrdMoEDataError(f"{name} has files of several kinds in the split {split}: {shown}. Give one of them.")
    (kind,) = kinds
    # `datasets` takes a path for a pattern, in which [1] stands for 1.
    options: dict[str, Any] = {
        "data_files": {one: [glob.escape(os.path.abspath(path)) for path in part] for one, part in of_split.items()}
    }
    if kind == "json":
        options["parse_agent_traces"] = False  # else columns such as `source` and `model` beside `messages` are a trace
    if kind == "csv":
        options |= {"sep": separator(paths[0]), "converters": dict.fromkeys(TEXTS, str), "keep_default_na": False}
    dataset = _load(kind, None, split, streaming, paths, name, **options)
    dataset.info.dataset_name = Path(name).absolute().name  # else that of the builder
    is_whole = split in files
    folders = {path.absolute().parent for path in paths}
    return dataset, Origin(name, paths if is_whole else (), folders.pop() if len(folders) == 1 else None)


def _read_folder(
    folder: Path, split: str | None, config: str | None, streaming: bool, defaults: Sequence[str], option: str
) -> tuple[Any, Origin]:
    name = str(folder)
    if any((folder / one).is_file() for one in SAVED):
        return _read_saved(folder, split, streaming, defaults, option)
    place = os.path.abspath(folder)
    if glob.has_magic(place):
        raise OrdMoEDataError(f"{place} has *, ? or [ in its name, which make it a pattern of names. Rename it.")
    try:
        builder = load_dataset_builder(place, config)
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise OrdMoEDataError(
            f"The folder {name} has no data that can be read: files that end in {', '.join(BUILDERS)}, or images."
        ) from error
    except (ValueError, RuntimeError, BadZipFile) as error:  # several configurations or kinds of files, a script
        raise OrdMoEDataError(f"The folder {name} cannot be read as a data set: {error}") from error
    tables = [path for path in sorted(folder.rglob("*")) if _is_table(path.relative_to(folder)) and path.is_file()]
    if isinstance(builder, FolderBasedBuilder) and tables:
        files = files_by_split(folder, tables)
        chosen = chosen_split(name, list(files), split, defaults, option)
        return _read_files(files, chosen, streaming, name)
    files = {str(one): [Path(path) for path in paths] for one, paths in builder.config.data_files.items()}
    chosen = chosen_split(name, list(files), split, defaults, option)
    readme = folder / "README.md"
    has_own = config is not None or (readme.is_file() and "configs:" in readme.read_text(errors="replace"))
    if not has_own and all(path.suffix.lower() in BUILDERS for paths in files.values() for path in paths):
        return _read_files(files, chosen, streaming, name)
    paths = [path for one in split_names(chosen) for path in files[one]]
    return _load(place, config, chosen, streaming, paths, name), Origin(name, folder=folder)


def _is_table(path: Path) -> bool:
    """Whether a path in a folder is a file of rows; `metadata` describes the images of a folder of images."""
    is_hidden = any(part.startswith((".", "__")) for part in path.parts)
    return path.suffix.lower() in BUILDERS and path.stem != "metadata" and not is_hidden


def _read_saved(
    folder: Path, split: str | None, streaming: bool, defaults: Sequence[str], option: str
) -> tuple[Any, Origin]:
    try:
        saved = load_from_disk(str(folder))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise OrdMoEDataError(f"The data set that was saved in {folder} cannot be read: {error}.") from error
    if isinstance(saved, Dataset):
        saved = {str(saved.split or "train"): saved}
    chosen = chosen_split(str(folder), list(saved), split, defaults, option)
    if chosen not in saved:
        raise OrdMoEDataError(f"{folder} was saved by save_to_disk: give a whole split as {option}, not {chosen!r}.")
    dataset = saved[chosen]
    return dataset.to_iterable_dataset() if streaming else dataset, Origin(str(folder), folder=folder)


def _read_from_hub(
    name: str, split: str | None, config: str | None, streaming: bool, defaults: Sequence[str], option: str
) -> tuple[Any, Origin]:
    if Path(name).suffix.lower() in BUILDERS or Path(name).is_absolute() or name.count("/") > 1 or "\\" in name:
        raise OrdMoEDataError(f"There is no file or folder {name}.")
    try:
        builder = load_dataset_builder(name, config)
    except (DatasetNotFoundError, EmptyDatasetError, DataFilesNotFoundError) as error:
        raise OrdMoEDataError(
            f"{name} is no file and no folder here, and cannot be had from the hub: {error}"
        ) from error
    splits = list(map(str, builder.config.data_files or builder.info.splits or ()))
    chosen = chosen_split(name, splits, split, defaults, option)
    return _load(name, config, chosen, streaming, (), name), Origin(name)


def _load(
    source: str,
    config: str | None,
    split: str,
    streaming: bool,
    files: Sequence[Path],
    name: str,
    **options: Any,
) -> Any:
    """What `datasets` reads; if it cannot, the first of `files` that has something wrong is named."""
    for path in files:
        if path.suffix.lower() in BUILDERS:
            check_file(path)
    try:
        return load_dataset(source, config, split=split, streaming=streaming, **options)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        for path in files:
            check_lines(path)
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise
        raise OrdMoEDataError(f"The split {split} of the data set {name} cannot be read: {cause}") from error


# --------------------------------------------------------------------------------------------------------------- texts
def _checked_texts(dataset: Dataset, origin: Origin) -> Dataset:
    """The data set, whose rows have text; images in messages become a column."""
    columns = _text_columns(dataset.column_names)
    for column in columns:
        feature = dataset.features[column]
        is_plain = "Json(" not in repr(feature) and "'type'" not in repr(feature)
        if is_plain:
            if _has_dates(dataset, column, origin):
                dataset = _with_values_as_written(dataset, column, origin)
            else:
                _check_texts(column_values(dataset, column), column, origin)
            continue
        values = list(_values_as_written(dataset, column, origin))
        _check_texts(values, column, origin)
        kinds = [type(value) for value in values]
        if len(set(kinds)) > 1:
            row = next(row for row, kind in enumerate(kinds) if kind is not kinds[0])
            raise OrdMoEDataError(
                f"{origin.place(row)} has {'text' if kinds[row] is str else 'messages'} in `{column}`, and the rows "
                "before it do not. Give every row text, or every row messages."
            )
        dataset = _with_image_column(dataset, column, values, origin)
    first = dataset.select_columns(columns)[0] if columns else {}
    if len({type(value) for value in first.values()}) > 1:
        raise OrdMoEDataError(
            f"{origin.place(0)} has text in one of `prompt` and `completion`, and messages in the other. Give both as "
            "text, or both as messages."
        )
    if set(COLUMNS) & set(dataset.column_names):
        _check_no_marks(dataset, columns, origin)
    return dataset


def _check_no_marks(dataset: Dataset, columns: Sequence[str], origin: Origin) -> None:
    """Raise [`OrdMoEDataError`] for messages that say in their text where an image stands: it would be read as text."""
    for column in columns:
        for row, value in enumerate(column_values(dataset, column)):
            if isinstance(value, list) and MARK in str(value):
                raise OrdMoEDataError(
                    f"{origin.place(row)} has {MARK} in the text of `{column}`, beside a column of images: models read "
                    'it as text. Leave it out, and images stand first, or make it a part {"type": "image"}.'
                )


def _text_columns(names: Sequence[str]) -> list[str]:
    if "prompt" in names:
        return [name for name in ("prompt", "completion") if name in names]
    return next(([name] for name in (*CONVERSATIONS, "text") if name in names), [])


def _values_as_written(dataset: Dataset, column: str, origin: Origin) -> Iterator[Any]:
    """A column's values. Where they are of mixed types, `datasets` takes a text such as 3 for the number."""
    feature = dataset.features[column]
    is_safe = "Json(" not in repr(feature) or (isinstance(feature, List) and isinstance(feature.feature, Json))
    if not _is_of_json_files(origin) or (is_safe and not _has_dates(dataset, column, origin)):
        yield from column_values(dataset, column)
        return
    yield from _values_in_files(column, origin)


def _values_in_files(column: str, origin: Origin) -> Iterator[Any]:
    return (row.get(column) for path in origin.files for _, row in json_rows(path))


def _is_of_json_files(origin: Origin) -> bool:
    return bool(origin.files) and all(BUILDERS[path.suffix.lower()] == "json" for path in origin.files)


def _has_dates(dataset: Dataset, column: str, origin: Origin) -> bool:
    """Whether texts of a column may have been read as dates: Arrow's reader of JSON does so where all of a part are."""
    if not _is_of_json_files(origin):
        return False
    is_date = "timestamp" in repr(dataset.features[column])
    return is_date or any(DATE.search(str(value)) for value in column_values(dataset, column))


def _with_values_as_written(dataset: Dataset, column: str, origin: Origin) -> Dataset:
    values = list(_values_in_files(column, origin))
    _check_texts(values, column, origin)
    return with_column(dataset, column, values, Value("string") if isinstance(values[0], str) else List(Json()))


def _check_texts(values: Any, column: str, origin: Origin) -> None:
    for row, value in enumerate(values):
        problem = text_problem(value, column)
        if problem is not None:
            raise OrdMoEDataError(
                f"{origin.place(row)} has {repr(value)[:200]} in `{column}`: {problem}. Mend or drop such rows."
            )


def _with_image_column(dataset: Dataset, column: str, values: list[Any], origin: Origin) -> Dataset:
    """The data set with `values` in `column`, without empty entries, and their images in `images`."""
    finder = ImageFinder(origin)
    parts = [without_payloads(value) for value in values]
    images = [[one for path in found for one in finder.find(path, column, row)] for row, (_, found) in enumerate(parts)]
    dataset = with_column(dataset, column, [messages for messages, _ in parts], List(Json()))
    if not any(images):
        if not set(COLUMNS) & set(dataset.column_names):
            _check_no_place_is_empty([messages for messages, _ in parts], column, origin)
        return dataset
    if set(COLUMNS) & set(dataset.column_names):
        row = next(row for row, found in enumerate(images) if found)
        raise OrdMoEDataError(
            f"{origin.place(row)} has images in `{column}`, and a column of images. Give one of them."
        )
    return with_column(dataset, "images", images, List(Image()))


def _check_no_place_is_empty(values: list[list[dict[str, Any]]], column: str, origin: Origin) -> None:
    """Raise [`OrdMoEDataError`] for messages that say where an image stands, where no image is given."""
    for row, messages in enumerate(values):
        contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        if any(part["type"] == "image" for content in contents for part in content):
            raise OrdMoEDataError(
                f"{origin.place(row)} has a part of the type 'image' in `{column}` that names no image, and there is "
                "no column `images`. Give the image's path in the part, or a column `images`."
            )
