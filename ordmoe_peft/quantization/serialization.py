"""Packed weights on disk: what is written beside their bytes, and how a weight is assembled from it.

A packed weight is saved as bitsandbytes saves that of a linear layer: its bytes under its own name, its scales, code
table and sizes under that name with an ending. Source of the seam on loading: `Bnb4bitDeserialize` in
`transformers/integrations/bitsandbytes.py`, which knows linear layers alone.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from .offloaded import offload
from .ring import Ring
from .storage import is_packed


# Endings of what `QuantState.as_dict(packed=True)` gives (`bitsandbytes/functional.py`); not every weight has all.
QUANT_STATE_ENDINGS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


def saved_tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the weight `name` is on disk: itself, and the state of a packed one beside its bytes."""
    state = weight.quant_state.as_dict(packed=True) if is_packed(weight) else {}
    return {name: weight.data} | {f"{name}.{ending}": tensor for ending, tensor in state.items()}


def state_dict_with_quant_states(model: nn.Module) -> dict[str, torch.Tensor]:
    """`model.state_dict()`, in which the state of each packed weight lies beside its bytes.

    bitsandbytes adds it for its own layers; a fused stack is a parameter of a module that knows nothing of it. A weight
    that is tied to another one on loading is left out, bytes and state: transformers would drop its bytes alone.
    """
    state_dict, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", {})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_packed(parameter):
            saved = saved_tensors(name, parameter)
            if name in tied:
                state_dict = {key: tensor for key, tensor in state_dict.items() if key not in saved}
            else:
                state_dict |= saved
    return state_dict


class AssembleQuantized(ConversionOps):
    """Makes one packed weight of its bytes and its state.

    Args:
        hf_quantizer ([`~transformers.quantizers.HfQuantizer`]): transformers does not cast what an operation with this
            attribute loads.
        ring ([`~ordmoe_peft.quantization.ring.Ring`], *optional*): that of stacks that stay in RAM.
    """

    def __init__(self, hf_quantizer: HfQuantizer, ring: Ring | None = None):
        self.hf_quantizer, self.ring = hf_quantizer, ring

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        target_patterns: list[str],
        full_layer_name: str,
        model: nn.Module,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if len(input_dict) == 1:
            return input_dict  # No state: the quantizer's check after loading says so by name.
        (name,) = target_patterns
        state = {key.removeprefix(f"{name}."): tensors[0] for key, tensors in input_dict.items()}
        packed_bytes = state.pop(name)
        module, _ = get_module_from_name(model, full_layer_name)
        linear = module if isinstance(module, Linear4bit) else None
        packed = Params4bit.from_prequantized(packed_bytes, state, device=packed_bytes.device, module=linear)
        if linear is None:
            packed.quant_state.dtype = self.hf_quantizer.quantization_config.bnb_4bit_compute_dtype
        return {name: packed if self.ring is None else offload(packed, self.ring)}


def packed_weight_conversions(
    names: list[str], base_model_prefix: str, hf_quantizer: HfQuantizer, rings: dict[str, Ring]
) -> list[WeightConverter]:
    """What assembles the packed weights `names` from a checkpoint in the model's own names.

    Those with an entry in `rings` stay in RAM, by that ring.

    One conversion for each name, without the prefix that a model without a head lacks. Every other tensor of the
    checkpoint is left to transformers, which loads it in the dtype that was asked for.
    """

    def conversion(name: str) -> WeightConverter:
        stem, ring = name.removeprefix(f"{base_model_prefix}."), rings.get(name)
        sources = [stem, *(f"{stem}.{ending}" for ending in QUANT_STATE_ENDINGS)]
        # On the CPU: transformers reads tensors to the device ahead of the conversion, all of them perhaps.
        return WeightConverter(sources, stem, [AssembleQuantized(hf_quantizer, ring)], force_cpu=ring is not None)

    return list(map(conversion, names))
