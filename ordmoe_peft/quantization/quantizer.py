"""Loads a checkpoint with its fused experts and decoder linears in 4 bits.

Source of the seam: `transformers/quantizers/quantizer_bnb_4bit.py`, whose linear-layer half is inherited.
"""

import copy
from collections.abc import Iterable

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from .._compat import keep_linear4bit_layout, save_in_original_format, save_in_own_names
from ..errors import OrdMoEModelError
from ..moe_layers import EXPERTS_IMPLEMENTATION, MoELayer, check_no_adapter, find_moe_layers
from .config import MoeBitsAndBytesConfig
from .dequantization import cast_rest_, unpack_stacks_
from .serialization import packed_weight_conversions, state_dict_with_quant_states
from .storage import BLOCK_SIZE, check_whole_blocks, is_packed, pack_experts


class MoeBnb4BitHfQuantizer(Bnb4BitHfQuantizer):
    """[`~transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer`] that also packs fused expert stacks."""

    def __init__(self, quantization_config: MoeBitsAndBytesConfig, **kwargs):
        # A copy: the modules to skip are written into it, and the caller may load another model with the original.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        return super().param_needs_quantization(model, param_name, **kwargs) or param_name in self.expert_stacks

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeLinearOrExperts(self, super().get_quantize_ops())

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return state_dict_with_quant_states(model), {}

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        if not self.pre_quantized:
            return super().update_weight_conversions(weight_conversions, model)
        # Not the family's own: they make fused stacks of experts, and this checkpoint has the model's own names.
        return packed_weight_conversions(self.packed_names(model), model.base_model_prefix, self)

    def packed_names(self, model: nn.Module) -> list[str]:
        """The names of all parameters of `model` that are to be in 4 bits, once its linear layers are replaced."""
        linears = (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit))
        return sorted([*self.expert_stacks, *linears])

    def select_expert_stacks(self, model: nn.Module) -> None:
        """Settle which stacks of `model` are to be packed.

        Raises:
            [`OrdMoEModelError`]: there are no MoE layers, or a stack cannot be packed.
        """
        skipped = set(self.quantization_config.llm_int8_skip_modules or [])
        layers = find_moe_layers(model)
        self.expert_stacks = {
            f"{layer.experts_name}.{projection}"
            for layer in layers
            if not any(layer.experts_name == name or layer.experts_name.endswith(f".{name}") for name in skipped)
            for projection in layer.projections
        }
        # Now, on the shapes alone: an error during loading would be buried in transformers' load report.
        for name in sorted(self.expert_stacks):
            check_whole_blocks(name, model.get_parameter(name).shape)

    def skip_modules(self, names: Iterable[str]) -> None:
        """Write the linear layers that stay as they are into the configuration, which is saved with the model."""
        skipped = set(self.quantization_config.llm_int8_skip_modules or [])
        self.quantization_config.llm_int8_skip_modules = sorted(skipped.union(names))

    def pack(self, name: str, weight_EOI: torch.Tensor) -> Params4bit:
        """Pack the stack `name` as the configuration says."""
        config = self.quantization_config
        return pack_experts(
            weight_EOI,
            name,
            quant_type=config.bnb_4bit_quant_type,
            use_double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=config.bnb_4bit_compute_dtype,
            quant_storage=config.bnb_4bit_quant_storage,
        )

    def adopt(self, model: nn.Module) -> None:
        """Give `model`, whose stacks are packed, all that a model loaded by this quantizer has."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        self.postprocess_model(model)

    def _process_model_before_weight_loading(self, model: nn.Module, device_map, **kwargs):
        self.select_expert_stacks(model)
        self.skip_modules(unquantised_linears(model, find_moe_layers(model)))
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        for name in self.packed_names(model):
            if not is_packed(model.get_parameter(name)):
                raise OrdMoEModelError(
                    f"{name} was to be loaded in 4 bits but is {model.get_parameter(name).dtype}: the checkpoint's "
                    "weights for it were missing or of another shape. See the load report above."
                )
        for module in model.modules():
            if isinstance(module, Linear4bit):
                keep_linear4bit_layout(module)
        save_in_own_names(model)
        # No other experts function can read packed stacks.
        self.experts_implementation_before = model.get_experts_implementation()
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Make `model` dense in `dtype`, by default its own, stack by stack; stock experts functions can run it."""
        check_no_adapter(model, "dequantise it")
        # transformers passes `config.dtype`, which it writes as a name when it saves the model.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        unpack_stacks_(model, sorted(self.expert_stacks), dtype)
        if any(isinstance(module, Linear4bit) for module in model.modules()):
            super()._dequantize(model, dtype=dtype)  # which fails where there is none (transformers 5.23)
        cast_rest_(model, dtype)
        model.config.dtype = dtype
        model.set_experts_implementation(self.experts_implementation_before)
        save_in_original_format(model)
        del model.is_loaded_in_4bit
        return model


class QuantizeLinearOrExperts(ConversionOps):
    """Packs a loaded tensor: expert stacks here, linear weights by transformers' own operation."""

    def __init__(self, hf_quantizer: MoeBnb4BitHfQuantizer, quantize_linear: ConversionOps):
        self.hf_quantizer = hf_quantizer
        self.quantize_linear = quantize_linear

    def convert(
        self, input_dict: dict[str, torch.Tensor], model: nn.Module | None = None, **kwargs
    ) -> dict[str, torch.Tensor]:
        stacks = {name: value for name, value in input_dict.items() if name in self.hf_quantizer.expert_stacks}
        linears = {name: value for name, value in input_dict.items() if name not in stacks}
        converted = self.quantize_linear.convert(linears, model=model, **kwargs) if linears else {}
        for name, value in stacks.items():
            module, _ = get_module_from_name(model, name)
            module._is_hf_initialized = True
            converted[name] = self.hf_quantizer.pack(name, value[0] if isinstance(value, list) else value)
        return converted


def unquantised_linears(model: nn.Module, layers: list[MoELayer]) -> list[str]:
    """Names of the linear layers that stay as they are: all outside the decoder stacks that hold MoE layers (heads,
    vision towers, projectors), routers, gates with one output, and layers whose rows are not whole blocks, which
    bitsandbytes' CPU kernel unpacks wrongly (0.50.2)."""
    decoders = tuple(f"{layer.decoder_layers_name}." for layer in layers)
    routers = tuple(f"{layer.router_name}." for layer in layers if layer.router_name)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (
            not name.startswith(decoders)
            or f"{name}.".startswith(routers)
            or module.out_features == 1
            or module.in_features % BLOCK_SIZE
        )
    ]
