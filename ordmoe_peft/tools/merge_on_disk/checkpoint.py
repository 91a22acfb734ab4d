"""A model's folder: its safetensors, read a tensor at a time, and the files beside them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import OrdMoEModelError


# Weights in forms that are not read, copies of weights in other layouts, and what describes the base alone.
NOT_READ = ("*/*", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "consolidated*", ".*")
NOT_COPIED = (*NOT_READ, "*.safetensors", "*.index.json", "README.md")


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a model's folder.

    Args:
        folder (`Path`): the folder.
        files (`dict[str, str]`): the file of each tensor.
        tensors (`dict[str, torch.Tensor]`): each tensor's shape and dtype, on the meta device.
    """

    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors by name. They are pages of their files, mapped for as long as the tensors live."""
        tensors: dict[str, torch.Tensor] = {}
        for file in {self.files[name] for name in names}:
            with safe_open(self.folder / file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in names if self.files[name] == file}
        return tensors


def checkpoint_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or the hub's, downloaded to the Hugging Face cache.

    Raises:
        `OSError`: from huggingface_hub, where the name is no folder and no repository that can be reached.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    return Path(snapshot_download(str(name_or_path), revision=revision, ignore_patterns=list(NOT_READ)))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find the tensors in `folder`; reads their headers alone.

    Raises:
        [`OrdMoEModelError`]: the folder is no model's, its weights are not in safetensors, or some are missing.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise OrdMoEModelError(f"{folder} holds no model: it has no {CONFIG_NAME}.")
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = [SAFE_WEIGHTS_NAME]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        there = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf")
        )
        raise OrdMoEModelError(
            f"{folder} lacks {missing[0]}: merging on disk reads safetensors, in one file or in shards with an index. "
            f"Weights that are there: {there or 'none'}. Load the model with transformers and save it again."
        )
    checkpoint = Checkpoint(folder)
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                header = opened.get_slice(name)
                if header.get_dtype() not in str_to_torch_dtype:
                    raise OrdMoEModelError(
                        f"{name} is of dtype {header.get_dtype()}, which merging does not know: dequantise the base "
                        "first."
                    )
                dtype = str_to_torch_dtype[header.get_dtype()]
                checkpoint.files[name] = file
                checkpoint.tensors[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return checkpoint


class ShardWriter:
    """Writes tensors to shards of a folder, as transformers names them, holding one shard at a time.

    Args:
        folder (`Path`): where to write.
        max_shard_size (`int`): bytes in a shard, unless what is added at once has more.
    """

    def __init__(self, folder: Path, max_shard_size: int):
        self.folder = folder
        self.max_shard_size = max_shard_size
        self.total_size = self.shard_size = 0
        self.shards: list[list[str]] = []
        self.shard: dict[str, torch.Tensor] = {}

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put tensors into one shard, this or, where they do not fit, the next."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.shard and self.shard_size + size > self.max_shard_size:
            self._write()
        self.shard |= tensors
        self.shard_size += size
        self.total_size += size

    def close(self) -> None:
        """Write the last shard, and the index where there are several."""
        self._write()
        stem, ending = SAFE_WEIGHTS_NAME.split(".")
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards, start=1):
            of_several = f"-{number:05d}-of-{len(self.shards):05d}" if len(self.shards) > 1 else ""
            file = f"{stem}{of_several}.{ending}"
            (self.folder / f"{number}.part").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        self.shards.append(list(self.shard))
        save_file(self.shard, self.folder / f"{len(self.shards)}.part", metadata={"format": "pt"})
        self.shard, self.shard_size = {}, 0


def files_beside(folder: Path) -> Iterator[Path]:
    """What a model's folder holds beside weights: configurations, tokenizer, processor, templates, code."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in NOT_COPIED):
            yield path
