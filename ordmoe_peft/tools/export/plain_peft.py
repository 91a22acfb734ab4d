"""An OrdMoE adapter as a LoRA adapter that PEFT loads without this package.

PEFT takes an adapter of type LORA for one of transformers 4 where its base has another form there, and converts the
names in its configuration and of its tensors (`peft/utils/transformers_weight_conversion.py`, peft 0.21.2; PEFT #3711).
It does so with names that have the new form already, too. So names are chosen here that are right after the conversion,
by the conversion itself, and PEFT reads the export on a base without weights before it is written.
"""

import json
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...adapter.config import OrdMoEConfig
from ...adapter.renaming import PREFIX, name_before, renamings_of
from ...adapter.saved import SavedAdapter
from ...errors import OrdMoEConfigError, OrdMoEModelError
from ...moe_model import without_wrappers
from ..base_on_meta import recorded_config
from ..merge_on_disk.weightless_model import make_weightless_
from .card import plain_card
from .folder import export_folder


logger = logging.get_logger(__name__)


def export_plain_lora(
    adapter: str | Path, output: str | Path, adapter_name: str | None = None, base: str | Path | None = None
) -> None:
    """Write an adapter to the folder `output` as a plain LoRA adapter.

    Its tensors are the same, all of them; `peft_type` becomes `LORA` and the fields that [`LoraConfig`] does not have
    go. Where PEFT would take a linear layer for another, its weight is named in `target_parameters` instead, and where
    PEFT renames a tensor, it is written under the name that becomes its own. A warning says when the former was needed:
    then PEFT needs a dense base.

    Args:
        adapter (`str` or `Path`): folder or hub id of the adapter.
        output (`str` or `Path`): folder that is not there, or is empty, or holds an earlier export, which goes.
        adapter_name (`str`, *optional*): the adapter's name, where several were saved; `default` by default.
        base (`str` or `Path`, *optional*): folder or hub id of the base, whose `config.json` is read; by default what
            the adapter's record says, or else its `base_model_name_or_path`.

    Raises:
        [`OrdMoEConfigError`]: there is no such adapter, its base is not known, or `output` holds something else.
        [`OrdMoEModelError`]: PEFT would not read it right under any name.
    """
    saved = SavedAdapter.read(adapter, subfolder_of(Path(adapter), adapter_name))
    tensors = saved.tensors()
    model = _base_without_weights(saved, base)
    settings = _without_converted_targets(saved.settings, list(tensors), model)
    names = _names_to_write(settings, tensors, model)
    written = {names[name]: tensor for name, tensor in tensors.items()}
    if isinstance(model, PreTrainedModel):
        _check_read(settings, tensors, names, model)
    else:
        logger.warning(f"{output}: the base is of no class of transformers, so reading this with PEFT was not tried.")
    with export_folder(output, "peft", saved.folder) as folder:
        save_file(written, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        is_for_dense = len(settings["target_parameters"]) > len(saved.settings["target_parameters"] or [])
        plain_card(settings["base_model_name_or_path"], settings, is_for_dense).save(folder / "README.md")


def subfolder_of(adapter: Path, adapter_name: str | None) -> str | None:
    """Where in `adapter` the adapter `adapter_name` is: PEFT saves `default` there, and others in folders within."""
    folders = (file.parent.name for file in adapter.glob(f"*/{CONFIG_NAME}"))
    others = sorted(name for name in folders if not name.startswith(PREFIX_CHECKPOINT_DIR))
    names = [*["default"] * (adapter / CONFIG_NAME).is_file(), *others]
    if adapter.is_dir() and (adapter_name or "default") not in names and names:
        raise OrdMoEConfigError(f"{adapter} has the adapters {names}, not {adapter_name or 'default'!r}. Name one.")
    if others and adapter_name is None:
        logger.warning(f"{adapter} also has the adapters {others}, which are exported one by one, by name.")
    return None if adapter_name in (None, "default") else adapter_name


def _base_without_weights(saved: SavedAdapter, base: str | Path | None) -> nn.Module:
    """The base of an adapter, with zeros that take no memory, or its configuration alone where it is of no class of
    transformers."""
    if base is None and saved.record is not None:
        class_name, values = saved.record["base"]["class"], recorded_config(saved.record["base"])
    else:
        source = base or saved.settings.get("base_model_name_or_path")
        try:
            values, _ = PreTrainedConfig.get_config_dict(source or "")
        except OSError as error:
            raise OrdMoEConfigError(
                f"{saved.folder} has no record of its base, and {str(source)!r} has no config.json, by which "
                "names are read. Give `base`, its folder or hub id."
            ) from error
        class_name = (values.get("architectures") or [""])[0]
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        model = nn.Module()
        model.config = SimpleNamespace(**values)
        return model
    config_class = CONFIG_MAPPING.get(values.get("model_type"), model_class.config_class)
    with torch.device("meta"):
        model = model_class(config_class.from_dict(values))
    return make_weightless_(model)


def _without_converted_targets(settings: dict[str, Any], names: list[str], model: nn.Module) -> dict[str, Any]:
    """The settings of a LoRA adapter, with linear layers that PEFT would take for others as parameters.

    Args:
        settings (`dict`): of the OrdMoE adapter.
        names (`list[str]`): of its tensors.
    """
    own_fields = {field.name for field in fields(OrdMoEConfig)} - {field.name for field in fields(LoraConfig)}
    parameters = settings["target_parameters"] or []
    owners = {without_wrappers(name.removeprefix(PREFIX)).partition(".lora_")[0] for name in names if ".lora_" in name}
    linears = owners - {name.rpartition(".")[0] for name in parameters}
    converted = {name for name in linears if not _is_kept(name, model)}
    plain = {name: value for name, value in settings.items() if name not in own_fields} | {"peft_type": "LORA"}
    plain["target_modules"] = sorted(linears - converted)
    plain["target_parameters"] = sorted([*parameters, *(f"{name}.weight" for name in converted)])
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = settings[field] or {}
        keys = {name: get_pattern_key(list(patterns), name) for name in converted}
        of_parameters = {f"{name}.weight": patterns[key] for name, key in keys.items() if key in patterns}
        plain[field] = {key: value for key, value in patterns.items() if key not in converted} | of_parameters
    if converted:
        logger.warning(
            f"Load this export on a dense base. PEFT would take {min(converted)} for a part of another layer, so the "
            "export names weights of linear layers as parameters, and on weights in 4 bits PEFT computes LoRA on "
            "parameters wrong, without a word (peft 0.21.2)."
        )
    if converted and settings["lora_dropout"]:
        logger.warning(
            f"lora_dropout={settings['lora_dropout']} is 0 in the export. It matters in training alone, and PEFT has "
            f"none on target_parameters, which {min(converted)}.weight has to be one of."
        )
        plain["lora_dropout"] = 0.0
    return plain


def _is_kept(linear: str, model: nn.Module) -> bool:
    """Whether PEFT takes the name of a linear layer for what it is."""
    config = LoraConfig(target_modules=[linear])
    try:
        convert_peft_config_for_transformers(config, model, conversions=None)
    except ValueError:  # it takes it for a part of a stack, and misses the other part
        return False
    return config.target_modules == {linear}


def _names_to_write(settings: dict[str, Any], tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, str]:
    """For each tensor, the name that PEFT makes its own of, if there is one."""
    config = PeftConfig.from_peft_type(**settings)
    kept = convert_peft_adapter_state_dict_for_transformers(model, config, dict(tensors))
    renamings = renamings_of(model)
    return {
        name: name if name in kept else PREFIX + name_before(name.removeprefix(PREFIX), renamings) for name in tensors
    }


def _check_read(
    settings: dict[str, Any], tensors: dict[str, torch.Tensor], names: dict[str, str], model: nn.Module
) -> None:
    """Have PEFT load the export on the base without weights, and see that each tensor is where it belongs.

    Raises:
        [`OrdMoEModelError`]: one is not.
    """
    config = PeftConfig.from_peft_type(**settings | {"init_lora_weights": True, "task_type": None})
    written = {names[name]: tensor for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():  # PEFT looks for patterns of parameters among modules, and says what is not so
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            loaded = PeftModel(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        set_peft_model_state_dict(loaded, written, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise OrdMoEModelError(f"PEFT cannot load this adapter without ordmoe_peft: {error}.") from error
    got = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    for name, tensor in tensors.items():
        if name not in got or got[name].is_meta or not torch.equal(got[name].to(tensor.dtype), tensor):
            read = convert_peft_adapter_state_dict_for_transformers(model, config, {names[name]: tensor})
            raise OrdMoEModelError(
                f"PEFT cannot load this adapter without ordmoe_peft: it reads {names[name]} as {', '.join(read)}, and "
                "no name as the one that is meant. Load the adapter with ordmoe_peft, or train one without the role "
                "that this tensor is of."
            )
