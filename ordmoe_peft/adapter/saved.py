"""A saved adapter: the files in its folder, read and checked before anything is done with them."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import logging

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..files import finish_files
from .record import RECORD_NAME, check_record, file_hash


logger = logging.get_logger(__name__)

# Adapters are computed in these. A cast from others (integers, 8 bits) would change their meaning.
DTYPES = ("BF16", "F16", "F32")
# Without them PEFT would take its own defaults for an adapter that was trained with others.
NEEDED = ("r", "lora_alpha", "targets", "num_tiers")


@dataclass
class SavedAdapter:
    """The files of an adapter.

    Args:
        folder (`Path`): where they are.
        settings (`dict`): its `adapter_config.json`.
        record (`dict`, *optional*): its `ordmoe.json`; see [`~ordmoe_peft.adapter.record`]. Adapters that were saved
            before there was one have none.
        ignore_fingerprint (`bool`, defaults to `False`): load it on another base with a warning.
    """

    folder: Path
    settings: dict[str, Any]
    record: dict[str, Any] | None
    ignore_fingerprint: bool = False

    @classmethod
    def read(cls, adapter: str | Path, subfolder: str | None = None, **lookup: Any) -> "SavedAdapter":
        """Read an adapter's small files, and download all of them where they are on the hub.

        Args:
            adapter (`str` or `Path`): a folder or hub id.
            subfolder (`str`, *optional*): where in it.
            lookup: as for `huggingface_hub.hf_hub_download`.

        Raises:
            [`OrdMoEConfigError`]: it is not the folder of an OrdMoE adapter, or its files are not of one save.
        """
        folder = Path(adapter, subfolder or "")
        if folder.is_dir():
            finish_files(folder)
        else:
            folder = _download(str(adapter), subfolder, lookup)
        if not (folder / CONFIG_NAME).is_file():
            raise OrdMoEConfigError(f"{folder} is not a saved adapter: it has no {CONFIG_NAME}.")
        settings = read_json(folder / CONFIG_NAME)
        if not isinstance(settings, dict) or settings.get("peft_type") != "ORDMOE":
            kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
            raise OrdMoEConfigError(f"{folder} holds an adapter of type {kind}, not an OrdMoE one.")
        missing = [name for name in NEEDED if name not in settings]
        if missing:
            raise OrdMoEConfigError(f"{folder / CONFIG_NAME} has no {missing[0]}. Restore the file that was saved.")
        record = folder / RECORD_NAME
        saved = cls(folder, settings, read_json(record) if record.is_file() else None)
        if saved.record is not None:
            check_record(saved.record, settings, record)
        return saved

    @property
    def weights_file(self) -> Path:
        return self.folder / SAFETENSORS_WEIGHTS_NAME

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's weights, in PEFT's names, with both checks."""
        self.check_weights()
        self.check_checksum()
        return load_file(self.weights_file)

    def check_weights(self) -> dict[str, tuple[int, ...]]:
        """See that the file of weights is whole and holds finite numbers.

        Returns:
            `dict`: names and shapes of its tensors.

        Raises:
            [`OrdMoEConfigError`]: it is not; the message names the file and the tensor.
        """
        shapes = {}
        with opened(self.weights_file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                view = tensors.get_slice(name)
                shapes[name] = tuple(view.get_shape())
                if view.get_dtype() not in DTYPES:
                    raise OrdMoEConfigError(
                        f"{self.weights_file} has {name} in {view.get_dtype()}; an adapter's weights are one of "
                        f"{DTYPES}. Save the adapter again."
                    )
                values = tensors.get_tensor(name)
                if not torch.isfinite(values).all():
                    bad = int((~torch.isfinite(values)).sum())
                    raise OrdMoEConfigError(
                        f"{self.weights_file} has {bad} of {math.prod(shapes[name])} numbers in {name} that are NaN or "
                        "infinite. Take an earlier checkpoint."
                    )
        return shapes

    def check_checksum(self) -> None:
        """See that the file of weights is the one that was saved, to the last bit.

        Raises:
            [`OrdMoEConfigError`]: it is not.
        """
        if self.record is None:
            logger.warning(
                f"{self.folder} has no {RECORD_NAME}: whether its weights are those that were saved, and on which "
                "base, cannot be checked. Load it on its own base and save it again."
            )
        elif file_hash(self.weights_file) != self.record["weights"]["sha256"]:
            raise OrdMoEConfigError(
                f"{self.weights_file} is not the file that {RECORD_NAME} was written for: its SHA-256 differs. It was "
                "changed, or comes from another save, or one is under way. Load it again, restore it, or save it again."
            )


def download_config(adapter: str, subfolder: str | None = None, **lookup: Any) -> Path:
    """The folder in the hub's cache with an adapter's configuration.

    Raises:
        [`OrdMoEConfigError`]: no folder and no repository on the hub has this name, or the hub cannot be reached.
    """
    try:
        return Path(hf_hub_download(adapter, CONFIG_NAME, subfolder=subfolder, **lookup)).parent
    except HFValidationError as error:
        raise OrdMoEConfigError(f"There is no folder {adapter}, and on the hub nothing has such a name.") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OrdMoEConfigError(
            f"There is no folder {adapter} here, and the hub gave no adapter of this id: {reason}"
        ) from error


def _download(adapter: str, subfolder: str | None, lookup: Mapping[str, Any]) -> Path:
    """The folder in the hub's cache with an adapter's files. A pickle is not among them."""
    options = {name: value for name, value in lookup.items() if name != "repo_type"}
    folder = download_config(adapter, subfolder, **options)
    with suppress(EntryNotFoundError):  # of an older version
        hf_hub_download(adapter, RECORD_NAME, subfolder=subfolder, **options)
    try:
        hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options)
    except EntryNotFoundError as error:
        raise OrdMoEConfigError(
            f"{adapter} has no {SAFETENSORS_WEIGHTS_NAME} on the hub. Adapters are read from safetensors files alone, "
            "never from pickles."
        ) from error
    return folder


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        [`OrdMoEConfigError`]: it has none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OrdMoEConfigError(f"{file} is no JSON ({error}). Restore the file that was saved.") from error


def opened(file: Path) -> Any:
    """A safetensors file, open.

    Raises:
        [`OrdMoEConfigError`]: it is not there, or is no whole safetensors file.
    """
    if not file.is_file():
        pickle = file.with_name(WEIGHTS_NAME)
        instead = f", and {pickle.name}, a pickle, is never read" if pickle.exists() else ""
        raise OrdMoEConfigError(
            f"{file.parent} has an adapter's configuration, but not its weights: there is no {file.name}{instead}. "
            "Save the adapter again. For a new adapter with this configuration, set its `base_moe` to None."
        )
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise OrdMoEConfigError(
            f"{file} cannot be read ({error}): it was not written or copied to its end. Save the adapter again."
        ) from error


def check_fits(saved: Mapping[str, Iterable[int]], attached: Mapping[str, torch.Tensor], source: str) -> None:
    """See that the tensors of a saved adapter are those of the adapter that was attached, each and no other.

    Args:
        saved (`dict`): names and shapes of what was saved.
        attached (`dict`): the adapter's tensors in the model.
        source (`str`): what was saved, for the message.

    Raises:
        [`OrdMoEModelError`]: one is missing, has another shape, or is none of the adapter's.
    """
    problems = [f"has no {name}" for name in attached if name not in saved]
    problems += [
        f"has {name} of shape {tuple(saved[name])}, where the model needs {tuple(tensor.shape)}"
        for name, tensor in attached.items()
        if name in saved and tuple(saved[name]) != tuple(tensor.shape)
    ]
    problems += [f"has {name}, which is no weight of the adapter" for name in saved if name not in attached]
    if problems:
        more = f" (and {len(problems) - 1} more such differences)" if len(problems) > 1 else ""
        raise OrdMoEModelError(
            f"{source} does not fit the adapter's configuration on this model: it {problems[0]}{more}. Load an adapter "
            "with the configuration that it was saved with. For a new adapter with a saved one's configuration, set "
            "`base_moe` of the configuration to None."
        )
