"""Packed expert stacks under FSDP2, which shards them like any other parameter if their bytes are presented as floats.

accelerate leaves stacks presented as `uint8`, the default, whole on every process, with a warning; with
`bnb_4bit_quant_storage="bfloat16"` they are sharded. What FSDP2 then gathers for a forward is a plain tensor of the
same bytes, without the scales, which stay whole on every process: an eighth of the bytes, less with double
quantisation.
"""

from typing import Any

from bitsandbytes.functional import QuantState
from torch import nn

from ..moe_model import find_moe_layers
from .storage import is_packed


def keep_packed_when_sharded(model: nn.Module) -> None:
    """Have the experts of `model` find the scales of their packed stacks also on what FSDP2 gathers.

    Call it before the model is sharded.
    """
    for layer in find_moe_layers(model):
        states = {
            name: weight.quant_state for name in layer.projections if is_packed(weight := getattr(layer.experts, name))
        }
        if states:
            layer.experts.register_forward_pre_hook(_StatesOnStacks(states))


class _StatesOnStacks:
    """Forward pre-hook of fused experts: puts the quantisation state on each stack that lost it."""

    def __init__(self, states: dict[str, QuantState]):
        self.states = states

    def __call__(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        for name, state in self.states.items():
            weight = getattr(experts, name)
            if not is_packed(weight):
                weight.quant_state, weight.quant_storage = state, weight.dtype
