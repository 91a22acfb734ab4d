"""Images that a data set gives by path: found from the folder of its file, and made images of `datasets`."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, IterableDataset, List, Value

from ..errors import OrdMoEDataError
from .origin import Origin
from .rows import CONVERSATIONS, column_values, with_column


COLUMNS = ("image", "images")
# `datasets` itself reads images at such addresses.
READ_BY_DATASETS = ("http://", "https://", "hf://")
# Rows of a stream that are looked at before it is read.
LOOKED_AT = 100
# What a part of a message may call the image that it holds.
PAYLOADS = ("image", "path", "url", "image_url")


class ImageFinder:
    """Finds the images that rows name.

    Args:
        origin ([`~ordmoe_peft.data.origin.Origin`]): where the rows came from.
    """

    def __init__(self, origin: Origin):
        self.origin = origin
        self._found: set[Path] = set()

    def find(self, value: Any, column: str, row: int) -> list[Any]:
        """The images of a row's value, a path, an encoded image or a list of them, as `datasets` takes them.

        Raises:
            [`OrdMoEDataError`]: a file that is not there, or something that names no image.
        """
        if value is None or value == "":
            return []
        return [self._one(part, column, row) for part in (value if isinstance(value, list) else [value])]

    def _one(self, image: Any, column: str, row: int) -> Any:
        if isinstance(image, dict) and image.get("bytes") is not None:
            return image
        path = image.get("path") if isinstance(image, dict) else image
        if not isinstance(path, str) or not path:
            raise self._error(row, column, image, "it must be the path of an image")
        if path.startswith(READ_BY_DATASETS):
            return path
        if "://" in path[:20] or path.startswith("data:"):
            readable = ", ".join(READ_BY_DATASETS)
            raise self._error(row, column, path, f"give a path, or an address that begins with {readable}")
        if self.origin.folder is None and not Path(path).is_absolute():
            reason = "a path from a folder that is not known here. Download the data and give its folder"
            if self.origin.files:
                reason = "the files of this split are in several folders: put them in one, or give absolute paths"
            raise self._error(row, column, path, reason)
        full = (self.origin.folder or Path()).absolute() / path
        if full not in self._found and not full.is_file():
            raise self._error(row, column, path, f"there is no file {full}")
        self._found.add(full)
        return str(full)

    def _error(self, row: int, column: str, value: Any, reason: str) -> OrdMoEDataError:
        return OrdMoEDataError(f"{self.origin.place(row)} has {repr(value)[:200]} in `{column}`: {reason}.")


def with_images(dataset: Dataset, origin: Origin) -> Dataset:
    """The data set with its columns `image` and `images` as images.

    `image` becomes `images` where a row has none or several.

    Raises:
        [`OrdMoEDataError`]: an image that cannot be found; names its row and path.
    """
    finder = ImageFinder(origin)
    for column in COLUMNS:
        if column not in dataset.column_names or _is_ready(dataset, column):
            continue
        values = column_values(dataset, column)
        images = [finder.find(value, column, row) for row, value in enumerate(values)]
        if column == "image" and all(len(of_row) == 1 for of_row in images):
            dataset = with_column(dataset, "image", [of_row[0] for of_row in images], Image())
        else:
            dataset = with_column(dataset.remove_columns(column), "images", images, List(Image()))
    return dataset


def _is_ready(dataset: Dataset, column: str) -> bool:
    feature = dataset.features[column]
    is_image = isinstance(feature.feature if isinstance(feature, List) else feature, Image)
    return is_image and isinstance(feature, List) == (column == "images") and not dataset.data[column].null_count


def with_streamed_images(dataset: IterableDataset, origin: Origin) -> IterableDataset:
    """[`with_images`] for a stream, whose paths are looked for as its rows are read; columns keep their names.

    Raises:
        [`OrdMoEDataError`]: one of the first rows has an image in a message, which a stream has no column for.
    """
    finder = ImageFinder(origin)
    has_column = bool(set(COLUMNS) & set(dataset.column_names or ()))
    for row, column in itertools.product(dataset.take(0 if has_column else LOOKED_AT), ("prompt", *CONVERSATIONS)):
        if isinstance(row.get(column), list) and without_payloads(row[column])[1]:
            raise OrdMoEDataError(
                f"{origin.name} has images in `{column}`, which cannot be streamed. Give them in a column `images`, or "
                "read the data without streaming."
            )
    for column in COLUMNS:
        feature = (dataset.features or {}).get(column)
        if (feature.feature if isinstance(feature, List) else feature) != Value("string"):
            continue

        def find(row: dict[str, Any], index: int, column: str = column) -> dict[str, Any]:
            images = finder.find(row[column], column, index)
            return {column: images if isinstance(row[column], list) else next(iter(images), None)}

        features = dataset.features.copy()
        features[column] = List(Image()) if isinstance(feature, List) else Image()
        # Given to `map`, these features would not decode what it returns.
        dataset = dataset.map(find, with_indices=True).cast(features)
    return dataset


def without_payloads(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages whose parts only say where an image stands, and the images that were in them, in order."""
    images: list[Any] = []
    return [_message_without(message, images) for message in messages], images


def _message_without(message: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = [_part_without(part, images) for part in message["content"]]
    return message


def _part_without(part: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") not in ("image", "image_url"):
        return part
    for payload in _payloads(part):
        images.append(payload.get("url") if isinstance(payload, dict) and "url" in payload else payload)
    return {"type": "image"}


def _payloads(part: dict[str, Any]) -> Iterator[Any]:
    return (part[key] for key in PAYLOADS if key in part)
