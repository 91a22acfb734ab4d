"""How many positions a model has, and rows that are longer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..errors import OrdMoEDataError


def num_positions(config: PretrainedConfig) -> int | None:
    """The longest row that the text model of `config` is made for, in tokens; None where it says none.

    Some configurations give the positions before their rotary embedding is stretched by a factor, and some after.
    """
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        return None
    ropes = [rope for rope in _ropes(getattr(text_config, "rope_parameters", None) or {}) if rope.get("factor")]
    stretched = [rope["factor"] * (rope.get("original_max_position_embeddings") or positions) for rope in ropes]
    return int(max([positions, *stretched]))


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of the rotary embedding, or of each layer type's."""
    by_layer_type = [part for part in parameters.values() if isinstance(part, dict)]
    return by_layer_type or [parameters]


def check_length(length: int, positions: int | None, what: str) -> None:
    """Raise [`OrdMoEDataError`] if `length` tokens are more than `positions`."""
    if positions is not None and length > positions:
        raise OrdMoEDataError(
            f"{what} has {length} tokens, and the model has {positions} positions (max_position_embeddings). Shorten "
            "or drop such rows; in training, max_length cuts them."
        )


def check_fits(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise [`OrdMoEDataError`] if a row of `inputs` has more tokens, padding aside, than `model` has positions."""
    positions = num_positions(model.config)
    if positions is not None and "input_ids" in inputs and inputs["input_ids"].shape[1] > positions:
        mask_BS = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        check_length(int(mask_BS.sum(1).max()), positions, "A sample")


def check_room(prompt_length: int, new_tokens: int, positions: int | None) -> None:
    """Raise [`OrdMoEDataError`] if a prompt and a response of `new_tokens` are more than `positions`."""
    if positions is not None and prompt_length + new_tokens > positions:
        raise OrdMoEDataError(
            f"A prompt has {prompt_length} tokens and its response may get {new_tokens}, and the model has {positions} "
            "positions (max_position_embeddings). Lower max_completion_length, or shorten or drop such rows."
        )
