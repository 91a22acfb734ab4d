"""Score only the positions that predict a token of a response.

On CUDA TRL's fused head projects these alone; on other devices it projects every position and drops what has no label
(`trl/trainer/utils.py`, `add_fused_lm_head`). Prompts are most of a row and vocabularies are wide, so here they are
picked before the head, whatever the device.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..tiers.scope import IGNORED_LABEL


def score_labelled(model: Callable, backbone: nn.Module, inputs: dict[str, Any]) -> Any:
    """`model(**inputs)` with TRL's fused head, whose per-token outputs are 0 where there is no label.

    Args:
        model (`Callable`): the model with the fused head, as the trainer wraps it.
        backbone (`nn.Module`): its part below the head.
        inputs (`dict`): with `labels` of shape `(B, S)`, for outputs of shape `(B, S - 1)`, or with `shift_labels`, for
            outputs of their shape.
    """
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
    is_labelled = labels != IGNORED_LABEL
    picked = {"shift_labels": labels[is_labelled].unsqueeze(0)}

    def pick(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden_BSH = output.last_hidden_state[:, : labels.shape[1]]
        output.last_hidden_state = hidden_BSH[is_labelled.to(hidden_BSH.device)].unsqueeze(0)
        return output

    def put_back(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape != picked["shift_labels"].shape:
            return value
        return value.new_zeros(labels.shape).masked_scatter(is_labelled.to(value.device), value)

    handle = backbone.register_forward_hook(pick)
    try:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"} | picked)
    finally:
        handle.remove()
    return type(outputs)(**{field.name: put_back(getattr(outputs, field.name)) for field in fields(outputs)})
