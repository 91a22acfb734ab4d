"""From packed weights back to a dense model."""

import torch
from accelerate.hooks import add_hook_to_module
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.utils import logging

from .._compat import accelerate_hook
from .offloaded import is_in_ram
from .storage import dense_stack, is_packed, logical_shape
from .unpacked_forward import stop_unpacking_


logger = logging.get_logger(__name__)


def dense_weight(packed: Params4bit, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that a packed weight, of a fused stack or of a linear layer, stands for."""
    is_stack = len(logical_shape(packed)) == 3
    return dense_stack(packed, dtype) if is_stack else dequantize_bnb_weight(packed).to(dtype)


def put_dense_(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put the dense `weight` in the place of the packed one called `name`; its linear layer becomes an ordinary one."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if not isinstance(owner, Linear4bit):
        setattr(owner, attribute, weight)
        return
    with torch.device("meta"):
        linear = nn.Linear(owner.in_features, owner.out_features, bias=False)
    linear.weight, linear.bias = weight, owner.bias
    if linear.bias is not None:  # which bitsandbytes casts to the dtype that it computes in (0.50.2)
        linear.bias.data = linear.bias.data.to(weight.dtype)
    succeed_(linear, owner)
    model.set_submodule(owner_name, linear)


def succeed_(linear: nn.Linear, predecessor: nn.Linear) -> None:
    """Give `linear` the mode and the hook of accelerate's of the layer whose place it takes."""
    linear.train(predecessor.training)
    hook = accelerate_hook(predecessor)
    if hook is not None:
        add_hook_to_module(linear, hook)


def packed_names(model: nn.Module) -> list[list[str]]:
    """The names of each packed weight of `model`: several where modules share it, as tied stacks of layers do."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_packed(parameter):
            names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def join_experts_in_ram_(model: PreTrainedModel) -> None:
    """Move `model` to the CPU if its experts stay in RAM, so that what they become is in one place with the rest."""
    if any(map(is_in_ram, model.parameters())) and model.device.type != "cpu":
        logger.warning(
            f"The experts of {type(model).__name__} are in RAM (offload_experts=True), and dense ones may not fit on "
            f"{model.device}: the whole model is on the CPU from now on."
        )
        model.to("cpu")


def unpack_(model: nn.Module, dtype: torch.dtype) -> None:
    """Make all packed weights dense, each freed before the next: one weight more than the result at most."""
    for names in packed_names(model):
        dense = nn.Parameter(dense_weight(model.get_parameter(names[0]), dtype))
        for name in names:
            put_dense_(model, name, dense)
    stop_unpacking_(model)


def cast_rest_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what was never packed and has the model's own dtype. A router held in float32 on purpose stays so."""
    own = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == own:
            parameter.data = parameter.data.to(dtype)
