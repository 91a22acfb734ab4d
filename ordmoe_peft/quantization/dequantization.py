"""From packed weights back to a dense model."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import get_module_from_name

from .storage import dense_stack


def unpack_stacks_(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Make the packed stacks `names` dense, each freed before the next: one stack more than the result at most."""
    for name in names:
        module, parameter_name = get_module_from_name(model, name)
        dense = nn.Parameter(dense_stack(getattr(module, parameter_name), dtype))
        setattr(module, parameter_name, dense)


def cast_rest_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give `dtype` to what was never packed and has the model's own dtype.

    What is held in another one on purpose, such as a router in float32, stays.
    """
    own = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == own:
            parameter.data = parameter.data.to(dtype)
