"""A saved adapter: the files in its folder, read and checked before anything is done with them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ..errors import OrdMoEConfigError


RECORD_NAME = "ordmoe.json"


@dataclass(frozen=True)
class SavedAdapter:
    """The files of an adapter.

    Args:
        folder (`Path`): where they are.
        settings (`dict`): its `adapter_config.json`.
        record (`dict`, *optional*): its `ordmoe.json`; see [`~ordmoe_peft.adapter.record`]. Adapters that were saved
            before there was one have none.
    """

    folder: Path
    settings: dict[str, Any]
    record: dict[str, Any] | None

    @classmethod
    def read(cls, folder: str | Path) -> "SavedAdapter":
        """Read the small files in `folder`.

        Raises:
            [`OrdMoEConfigError`]: it is not the folder of an OrdMoE adapter.
        """
        folder = Path(folder)
        missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / name).is_file()]
        if missing:
            raise OrdMoEConfigError(f"{folder} is not a saved adapter: it has no {' and no '.join(missing)}.")
        settings = json.loads((folder / CONFIG_NAME).read_text())
        if settings.get("peft_type") != "ORDMOE":
            raise OrdMoEConfigError(f"{folder} holds a {settings.get('peft_type')} adapter, not an OrdMoE one.")
        file = folder / RECORD_NAME
        return cls(folder, settings, json.loads(file.read_text()) if file.is_file() else None)

    @property
    def weights_file(self) -> Path:
        return self.folder / SAFETENSORS_WEIGHTS_NAME

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's weights, in PEFT's names."""
        return load_file(self.weights_file)
