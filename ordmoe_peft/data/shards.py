"""A data set as a folder of Parquet shards, each complete or absent, so that a killed run goes on where it stopped.

`load_dataset(folder)` reads the folder like any data set of the hub: shards are `data/train-00000-of-0000N.parquet`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..errors import OrdMoEConfigError
from ..files import whole_file, write_whole


@dataclass(frozen=True)
class ShardFolder:
    """Where the shards of a data set are.

    Args:
        folder (`Path`): the data set's folder.
        num_samples (`int`): its rows.
        samples_per_shard (`int`): rows in each shard but the last, which may have fewer.
    """

    folder: Path
    num_samples: int
    samples_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.samples_per_shard)

    def path(self, index: int) -> Path:
        return self.folder / "data" / f"train-{index:05d}-of-{self.num_shards:05d}.parquet"

    def samples(self, index: int) -> range:
        """The samples that shard `index` holds."""
        start = index * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.num_samples))

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [index for index in range(self.num_shards) if not self.path(index).exists()]

    def write(self, index: int, rows: Dataset) -> None:
        """Write shard `index` under a name that no reader looks at, and rename it when it is complete."""
        with whole_file(self.path(index)) as unfinished:
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
