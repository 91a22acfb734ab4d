"""Loads a checkpoint with its fused experts and decoder linears in 4 bits.

Source of the seam: `transformers/quantizers/quantizer_bnb_4bit.py`, whose linear-layer half is inherited.
"""

import copy

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging

from .._compat import keep_linear4bit_layout
from ..errors import OrdMoEModelError
from ..moe_layers import EXPERTS_IMPLEMENTATION, find_moe_layers
from .census import quantization_census
from .config import MoeBitsAndBytesConfig
from .file_pages import release_file_pages
from .selection import check_experts_interface, expert_stacks, linear_block_size, unquantised_linears
from .storage import Matrices, is_packed, pack_experts
from .streaming import PackWhileMerging, packs_by_expert


logger = logging.get_logger(__name__)


class MoeBnb4BitHfQuantizer(Bnb4BitHfQuantizer):
    """[`~transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer`] that also packs fused expert stacks."""

    def __init__(self, quantization_config: MoeBitsAndBytesConfig, **kwargs):
        # A copy: the modules to skip are written into it, and the caller may load another model with the original.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        return super().param_needs_quantization(model, param_name, **kwargs) or self.is_stack(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeLinearOrExperts(self, super().get_quantize_ops())

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        conversions = super().update_weight_conversions(weight_conversions, model)
        for conversion in [] if self.pre_quantized else conversions:
            operations = getattr(conversion, "operations", [])
            # What is merged in another way is packed when it is whole, by `get_quantize_ops`.
            if operations and packs_by_expert(operations):
                conversion.operations = [PackWhileMerging(operations, self.pack, self.is_stack, self.release)]
        return conversions

    def is_serializable(self) -> bool:
        return False

    def is_stack(self, param_name: str) -> bool:
        """Whether the parameter is a fused stack that is to be in 4 bits."""
        return param_name in self.expert_stacks

    def pack(self, matrices: Matrices, name: str) -> Params4bit:
        """The packed stack `name`."""
        return pack_experts(matrices, name, **self.quantization_config.packing())

    def release(self, tensors: list[torch.Tensor]) -> None:
        """Let go of what was read from the checkpoint for `tensors`."""
        release_file_pages(tensors, self.checkpoint_files)

    def _process_model_before_weight_loading(self, model: nn.Module, device_map, checkpoint_files=None, **kwargs):
        config, self.checkpoint_files = self.quantization_config, checkpoint_files or []
        # Now, on the names alone: an error during loading would be buried in transformers' load report.
        check_experts_interface(model, config.llm_int8_skip_modules)
        layers = find_moe_layers(model)
        self.expert_stacks = expert_stacks(layers, config.llm_int8_skip_modules)
        config.llm_int8_skip_modules = sorted(
            {*(config.llm_int8_skip_modules or []), *unquantised_linears(model, layers)}
        )
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.weight.blocksize = linear_block_size(module.in_features, config.bnb_4bit_blocksize)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        for name in sorted(self.expert_stacks):
            if not is_packed(model.get_parameter(name)):
                raise OrdMoEModelError(
                    f"{name} was to be loaded in 4 bits but is {model.get_parameter(name).dtype}: the checkpoint's "
                    "weights for it were missing or of another shape. See the load report above."
                )
        for module in model.modules():
            if isinstance(module, Linear4bit):
                keep_linear4bit_layout(module)
        # No other experts function can read packed stacks.
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        model = super()._process_model_after_weight_loading(model, **kwargs)
        logger.info(f"Loaded {type(model).__name__} in 4 bits: {quantization_census(model).summary()}")
        return model


class QuantizeLinearOrExperts(ConversionOps):
    """Packs a loaded tensor: expert stacks here, linear weights by transformers' own operation."""

    def __init__(self, hf_quantizer: MoeBnb4BitHfQuantizer, quantize_linear: ConversionOps):
        self.hf_quantizer = hf_quantizer
        self.quantize_linear = quantize_linear

    def convert(
        self, input_dict: dict[str, torch.Tensor], model: nn.Module | None = None, **kwargs
    ) -> dict[str, torch.Tensor]:
        converted = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if is_packed(tensor):
                converted[name] = tensor
            elif self.hf_quantizer.is_stack(name):
                converted[name] = self.hf_quantizer.pack(tensor, name)
            else:
                converted |= self.quantize_linear.convert({name: tensor}, model=model, **kwargs)
            if self.hf_quantizer.is_stack(name):
                get_module_from_name(model, name)[0]._is_hf_initialized = True
            self.hf_quantizer.release([tensor])
        return converted
