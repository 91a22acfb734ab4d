"""The file of a saved adapter: what tensors it has, and whether they are those of the adapter in a model.

Its header is read before the adapter is attached, so that a file that does not fit leaves the model as it was.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..errors import OrdMoEConfigError, OrdMoEModelError


def find_weights(adapter: str | Path, subfolder: str | None = None, **lookup: str | None) -> Path | None:
    """Where the weights of an adapter are, or should be in its folder.

    `None` where PEFT has to find them: in a pickle, or on the hub and not in the cache.

    Args:
        adapter (`str` or `Path`): a folder or hub id.
        subfolder (`str`, *optional*): where in it.
        lookup: as for `huggingface_hub.hf_hub_download`.
    """
    folder = Path(adapter, subfolder or "")
    if (folder / CONFIG_NAME).is_file():
        file = folder / SAFETENSORS_WEIGHTS_NAME
        return file if file.exists() or not (folder / WEIGHTS_NAME).exists() else None
    name = f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME
    options = {option: lookup[option] for option in ("cache_dir", "revision", "repo_type") if lookup.get(option)}
    cached = try_to_load_from_cache(str(adapter), name, **options)
    return Path(cached) if isinstance(cached, str) else None


def saved_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The tensors in `file`, from its header alone.

    Raises:
        [`OrdMoEConfigError`]: it is not there, or is no whole safetensors file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise OrdMoEConfigError(
            f"{file.parent} has an adapter's configuration, but not its weights: there is no {file.name}. Save the "
            "adapter again. For a new adapter with this configuration, set its `base_moe` to None."
        ) from error
    except SafetensorError as error:
        raise OrdMoEConfigError(
            f"{file} cannot be read ({error}): it was not written or copied to its end. Save the adapter again."
        ) from error


def check_fits(saved: Mapping[str, Iterable[int]], attached: Mapping[str, torch.Tensor], source: str) -> None:
    """See that the tensors of a saved adapter are those of the adapter that was attached.

    Args:
        saved (`dict`): names and shapes of what was saved, more than LoRA's factors perhaps.
        attached (`dict`): the adapter's tensors in the model.
        source (`str`): what was saved, for the message.

    Raises:
        [`OrdMoEModelError`]: one is missing, has another shape, or has no place in the model.
    """
    problems = [f"has no {name}" for name in attached if name not in saved]
    problems += [
        f"has {name} of shape {tuple(saved[name])}, where the model needs {tuple(tensor.shape)}"
        for name, tensor in attached.items()
        if name in saved and tuple(saved[name]) != tuple(tensor.shape)
    ]
    problems += [f"has {name}, which the model does not" for name in saved if ".lora_" in name and name not in attached]
    if problems:
        more = f" (and {len(problems) - 1} more such differences)" if len(problems) > 1 else ""
        raise OrdMoEModelError(
            f"{source} does not fit the adapter's configuration on this model: it {problems[0]}{more}. Load an adapter "
            "with the configuration that it was saved with. For a new adapter with a saved one's configuration, set "
            "`base_moe` of the configuration to None."
        )
