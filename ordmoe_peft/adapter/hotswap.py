"""Another adapter in the place of one that a model has.

PEFT's own (`peft/utils/hotswap.py`) is for the type LORA, and fills up smaller ranks with zeros at the end of a factor,
which for a stack of experts is not the end of each expert's part.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..errors import OrdMoEConfigError
from .saved import SavedAdapter


# The new adapter's name while the old one is there.
INCOMING = "incoming_adapter"


def hotswap_adapter(model: PeftModel, adapter: str | Path, adapter_name: str = "default", **kwargs: Any) -> None:
    """Put a saved adapter in the place of the one named `adapter_name`: its weights and all of its settings.

    It may have another rank, alpha, tiers, or other linear layers; routers and experts must be the same. All files are
    checked first. For a moment the model has both adapters. A compiled model is compiled anew.

    Args:
        model ([`~peft.PeftModel`]): with OrdMoE adapters.
        adapter (`str` or `Path`): a folder or hub id.
        adapter_name (`str`, defaults to `"default"`): which adapter goes.
        kwargs: as for [`~ordmoe_peft.adapter.peft_model.OrdMoEAdapters.load_adapter`].

    Raises:
        [`OrdMoEConfigError`]: the model has no adapter of that name, it is merged, or one of both has
            `modules_to_save` or `trainable_token_indices`.
        `ValueError`: the new adapter does not fit, as `load_adapter` says; the model is as it was.
    """
    if adapter_name not in model.peft_config:
        raise OrdMoEConfigError(
            f"The model has no adapter {adapter_name!r} to replace, only {list(model.peft_config)}."
        )
    if any(adapter_name in getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise OrdMoEConfigError(
            f"The adapter {adapter_name!r} is merged. Call `unmerge_adapter` before it is replaced."
        )
    lookup = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
    incoming = SavedAdapter.read(adapter, kwargs.get("subfolder"), **lookup).settings
    for whose, settings in ((adapter_name, vars(model.peft_config[adapter_name])), (adapter, incoming)):
        for field in ("modules_to_save", "trainable_token_indices"):
            if settings.get(field):
                raise OrdMoEConfigError(
                    f"The adapter {str(whose)!r} has {field}={settings[field]!r}, whole weights beside LoRA, which are "
                    "not swapped. Use `load_adapter`, `set_adapter` and `delete_adapter`."
                )
    active = list(model.active_adapters)
    model.load_adapter(adapter, INCOMING, **kwargs)
    model.base_model.set_adapter(INCOMING)  # PEFT would choose for us where the active one goes
    model.delete_adapter(adapter_name)
    for module in list(model.modules()):
        for holder in (*vars(module).values(), *module.children()):
            if isinstance(holder, dict | nn.ModuleDict | nn.ParameterDict) and INCOMING in holder:
                holder[adapter_name] = holder.pop(INCOMING)
    model.base_model.set_adapter(active, inference_mode=model.peft_config[adapter_name].inference_mode)
    model.active_adapter = active[0]
