"""A data set as a folder of Parquet shards, each complete or absent, so that a killed run goes on where it stopped.

`load_dataset(folder)` reads the folder like any data set of the hub: shards are `data/train-00000-of-0000N.parquet`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..errors import OrdMoEConfigError
from ..files import whole_file, write_whole


def shards(folder: Path, num_samples: int, samples_per_shard: int) -> dict[Path, range]:
    """Each shard's file → the samples that it holds; the last shard may have fewer."""
    starts = range(0, num_samples, samples_per_shard)
    names = (f"train-{index:05d}-of-{len(starts):05d}.parquet" for index in range(len(starts)))
    return {
        folder / "data" / name: range(start, min(start + samples_per_shard, num_samples))
        for name, start in zip(names, starts, strict=True)
    }


def write_shard(path: Path, rows: Dataset) -> None:
    """Write a shard under a name that no reader looks at, and rename it when it is complete."""
    with whole_file(path) as unfinished, without_inner_bars():
        rows.to_parquet(unfinished)


@contextmanager
def without_inner_bars() -> Iterator[None]:
    """Within the block, datasets shows no progress of its own: one bar counts the samples."""
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()


def claim_folder(folder: Path, settings_name: str, settings: dict[str, Any]) -> None:
    """Record `settings` in a new folder, or see that an old one has the same, so that all its shards belong together.

    Args:
        folder (`Path`): the data set's folder; made if it is not there.
        settings_name (`str`): the file in it that holds the settings, as JSON.
        settings (`dict`): everything that decides what the rows are.

    Raises:
        [`OrdMoEConfigError`]: the folder was written with other settings, or by something else. Nothing in it changes.
    """
    path = folder / settings_name
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    data = sorted(folder.rglob("*.parquet"))
    if data and not path.exists():
        raise OrdMoEConfigError(
            f"{folder} holds {data[0].relative_to(folder)} but no {settings_name}, so what is there cannot be "
            "continued. Choose another output folder."
        )
    there, now = flattened(json.loads(path.read_text()) if data else {}), flattened(json.loads(text))
    differing = [
        f"{name} ({there.get(name)!r} there, {now.get(name)!r} now)"
        for name in sorted({*there, *now})
        if there.get(name) != now.get(name)
    ]
    # Settings that no shard was written with, such as those of a run that ran out of memory, bind nobody.
    if data and differing:
        raise OrdMoEConfigError(
            f"{folder} was written with other settings: {', '.join(differing)}. Use the same settings to go on "
            "with it, or another output folder."
        )
    write_whole(path, text)


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
