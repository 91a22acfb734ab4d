"""Packed expert stacks under FSDP2, which shards them like any other parameter if their bytes are presented as floats.

accelerate leaves stacks presented as `uint8`, the default, whole on every process, with a warning; with
`bnb_4bit_quant_storage="bfloat16"` they are sharded. What FSDP2 then gathers for a forward is a plain tensor of the
same bytes, without the scales. Those stay whole on every process: an eighth of the bytes, less with double
quantisation.
"""

from typing import Any

from torch import nn

from ..moe_model import MoEModel, parameter_of, unwrapped
from .selection import stack_readers
from .storage import is_packed


def keep_packed_when_sharded(model: nn.Module) -> None:
    """Put the quantisation states of packed stacks back on what FSDP2 gathers, before each forward of what reads
    them.

    Call it before the model is sharded.
    """
    states: dict[str, dict[str, Any]] = {}
    for name, reader in stack_readers(MoEModel.of(model).all_layers).items():
        weight = parameter_of(model, name)
        if is_packed(weight):
            states.setdefault(reader, {})[name.removeprefix(f"{reader}.")] = weight.quant_state
    for reader, of_stacks in states.items():
        # On LoRA's wrapper, if there is one, which reads the stacks before what it wraps.
        model.get_submodule(reader).register_forward_pre_hook(_RestoreStates(of_stacks))


class _RestoreStates:
    """Forward pre-hook of what reads packed stacks, of a class of its own so that models can be pickled."""

    def __init__(self, states: dict[str, Any]):
        self.states = states

    def __call__(self, reader: nn.Module, args: tuple[Any, ...]) -> None:
        for name, state in self.states.items():
            weight = parameter_of(unwrapped(reader), name)
            if not is_packed(weight):
                weight.quant_state, weight.quant_storage = state, weight.dtype
