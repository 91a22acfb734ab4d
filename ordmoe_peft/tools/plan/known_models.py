"""The configuration of a model that is to be planned: from a folder, from what ships here, or from the hub."""

import os
from importlib.resources import files
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

from ...errors import OrdMoEModelError
from ...quantization.config import QUANT_METHOD, MoeBitsAndBytesConfig
from ...quantization.other_quantizers import quant_method
from ..model_config import read_config


# Name → `hub_ids`, `parameters`, `source` and `config`; the file says what these are.
KNOWN_MODELS: dict[str, dict[str, Any]] = yaml.safe_load((files(__package__) / "known_models.yaml").read_text("utf-8"))


def load_config(name: str, revision: str = "main") -> PretrainedConfig:
    """As [`find_config`], for a model whose weights are dense or in 4 bits of ours.

    Raises:
        [`OrdMoEModelError`]: there is none, or its weights are quantised by something else.
    """
    config = find_config(name, revision)
    method = quant_method(config)
    if method not in (None, QUANT_METHOD):
        raise OrdMoEModelError(
            f"{name!r} is quantised by {method!r}, whose weights this does not plan. Give an unquantised checkpoint of "
            "it."
        )
    return config


def find_config(name: str, revision: str = "main", trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a folder, of a key of [`KNOWN_MODELS`] or one of their hub ids, or of another hub id.

    Args:
        name (`str`), revision (`str`): which.
        trust_remote_code (`bool`, defaults to `False`): run code that comes with it.

    Raises:
        [`OrdMoEModelError`]: there is none.
    """
    if not os.path.isdir(name):
        for short_name, known in KNOWN_MODELS.items():
            if name in (short_name, *known["hub_ids"]):
                return AutoConfig.for_model(**known["config"])
    instead = f"Give a folder with a config.json, a hub id, or one known without the hub ({', '.join(KNOWN_MODELS)})."
    return read_config(name, revision, trust_remote_code, instead)


def stored_quantization(config: PretrainedConfig) -> MoeBitsAndBytesConfig | None:
    """How the checkpoint of `config` is quantised already, if it is."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    ours = ("bnb_4bit", "llm_int8_skip_modules")
    return MoeBitsAndBytesConfig(**{name: value for name, value in settings.items() if name.startswith(ours)})
