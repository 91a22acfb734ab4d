"""An adapter's base without weights: as its record describes it, or by name."""

import json
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from ..adapter.saved import SavedAdapter
from ..errors import OrdMoEConfigError
from .families import build_model
from .plan.known_models import find_config


def base_on_meta(
    adapter: SavedAdapter, base: str | None = None, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The base of `adapter` on the meta device. Where the record describes it, nothing else is read.

    Args:
        adapter ([`SavedAdapter`]): the adapter.
        base (`str`, *optional*): folder or hub id of the base, which goes before the record.
        revision (`str`), trust_remote_code (`bool`): of that.

    Raises:
        [`OrdMoEConfigError`]: the adapter does not say what its base is.
        [`OrdMoEModelError`]: there is no such base.
    """
    recorded = (adapter.record or {}).get("base") or {}
    architecture = getattr(transformers, recorded.get("class") or "", None)
    if base is None and architecture is not None and recorded.get("config"):
        config = AutoConfig.for_model(**recorded_config(recorded))
        with torch.device("meta"):
            model = architecture(config).eval()
        model.config.quantization_config = recorded.get("quantization")  # as the adapter's own base has it
        return model
    name = base or base_name(adapter)
    if not name:
        raise OrdMoEConfigError(f"{adapter.folder} does not say what its base is: give `base` (MODEL).")
    return build_model(find_config(name, revision, trust_remote_code), trust_remote_code)


def recorded_config(base: dict[str, Any]) -> dict[str, Any]:
    """The configuration in an adapter's record of its `base`, as transformers reads it from a file: it writes infinity
    as `{"__float__": "Infinity"}`."""
    text, as_float = json.dumps(base["config"]), "__float__"
    return json.loads(text, object_hook=lambda part: float(part[as_float]) if as_float in part else part)


def base_name(adapter: SavedAdapter) -> str:
    """The folder or hub id of an adapter's base; empty where it is not known."""
    recorded = (adapter.record or {}).get("base") or {}
    return recorded.get("id") or adapter.settings.get("base_model_name_or_path") or ""
