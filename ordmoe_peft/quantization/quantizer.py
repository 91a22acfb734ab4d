"""Loads a checkpoint with its experts and decoder linears in 4 bits.

Source of the seam: `transformers/quantizers/quantizer_bnb_4bit.py`, whose linear-layer half is inherited.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging

from .._compat import keep_linear4bit_layout, mark_initialized, save_in_original_format, save_in_own_names
from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import EXPERTS_IMPLEMENTATION, check_no_adapter, is_fused_experts
from .config import MoeBitsAndBytesConfig
from .dequantization import cast_rest_, join_experts_in_ram_, unpack_
from .memory_by_role import quantization_census
from .offloaded import offload
from .ring import Ring
from .selection import (
    expert_linears,
    expert_stacks,
    linear_block_size,
    packable_layers,
    skips_nothing,
    stack_readers,
    unquantised_linears,
)
from .serialization import packed_weight_conversions, state_dict_with_quant_states
from .storage import Matrices, check_packable, is_packed, pack_experts
from .streaming import PackWhileMerging, packs_by_expert
from .unpacked_forward import check_own_forward, unpack_in_forward_


logger = logging.get_logger(__name__)


class MoeBnb4BitHfQuantizer(Bnb4BitHfQuantizer):
    """[`~transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer`] that also packs expert stacks."""

    expert_stacks: set[str]
    expert_linears: set[str]  # those of experts that are modules of their own
    readers: list[str]  # modules outside transformers' experts interface whose forward reads stacks to pack

    def __init__(self, quantization_config: MoeBitsAndBytesConfig, **kwargs: Any):
        # A copy: the modules to skip are written into it, and the caller may load another model with the original.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.ring = Ring()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.quantization_config.offload_experts:
            devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
            if len(devices) > 1 or "disk" in devices or not isinstance(device_map, dict | None):
                raise OrdMoEConfigError(
                    f"offload_experts=True serves one device, but device_map={device_map!r}. Name it, as in "
                    "`device_map={'': 0}`, or leave device_map out."
                )
            if not torch.accelerator.is_available():
                logger.warning_once(
                    "offload_experts=True without a GPU: experts are in RAM anyway, and each layer is copied within it."
                )
        super().validate_environment(*args, device_map=device_map, **kwargs)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        is_in_ram = self.quantization_config.offload_experts and self.is_stack(param_name)
        return 0 if is_in_ram else super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return super().param_needs_quantization(model, param_name, **kwargs) or self.is_stack(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeLinearOrExperts(self, super().get_quantize_ops())

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        if self.pre_quantized:
            # Not the family's own: they make fused stacks of experts, and this checkpoint has the model's own names.
            rings = dict.fromkeys(self.expert_stacks, self.ring) if self.quantization_config.offload_experts else {}
            return packed_weight_conversions(self.packed_names(model), model.base_model_prefix, self, rings)
        conversions = super().update_weight_conversions(weight_conversions, model)
        for conversion in conversions:
            operations = getattr(conversion, "operations", [])
            # What is merged in another way is packed when it is whole, by `get_quantize_ops`.
            if operations and packs_by_expert(operations):
                conversion.operations = [PackWhileMerging(operations, self.pack, self.is_stack)]
        return conversions

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return state_dict_with_quant_states(model), {}

    def is_stack(self, param_name: str) -> bool:
        """Whether the parameter is an expert stack that is to be in 4 bits."""
        return param_name in self.expert_stacks

    def packed_names(self, model: nn.Module) -> list[str]:
        """The names of all parameters of `model` that are to be in 4 bits, once its linear layers are replaced."""
        linears = (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit))
        return sorted([*self.expert_stacks, *linears])

    def pack(self, matrices: Matrices, name: str) -> Params4bit:
        """The packed stack `name`, in RAM if that is where it is to stay."""
        packing = self.quantization_config.packing()
        if isinstance(matrices, torch.Tensor) and matrices.dim() == 2:  # all experts in one matrix
            packing["blocksize"] = linear_block_size(matrices.shape[1], packing["blocksize"])
        packed = pack_experts(matrices, name, **packing)
        return offload(packed, self.ring) if self.quantization_config.offload_experts else packed

    def select(self, model: nn.Module, also_skipped: Iterable[str]) -> None:
        """Choose the parameters to quantise: all except `llm_int8_skip_modules` and `also_skipped`.

        The latter are added to the former in the configuration, which is saved with the model and says on loading what
        is packed there.

        Raises:
            [`OrdMoEModelError`]: there are no MoE layers, or experts of a kind or dtype that nothing can run packed.
        """
        config = self.quantization_config
        layers = packable_layers(model, config.llm_int8_skip_modules)
        unknown = [] if self.pre_quantized else skips_nothing(model, config.llm_int8_skip_modules)
        if unknown:
            logger.warning(
                f"llm_int8_skip_modules names {unknown}, of which {type(model).__name__} has nothing: what was to "
                "keep its dtype may be packed."
            )
        config.llm_int8_skip_modules = sorted({*(config.llm_int8_skip_modules or []), *also_skipped})
        readers = stack_readers(layers)
        fused = {layer.experts_name for layer in layers if layer.kind == "fused"}
        self.expert_stacks = expert_stacks(model, readers, config.llm_int8_skip_modules)
        self.expert_linears = expert_linears(layers, config.llm_int8_skip_modules)
        self.readers = sorted({readers[name] for name in self.expert_stacks} - fused)
        for name in self.readers:
            check_own_forward(name, model.get_submodule(name))
        if not self.pre_quantized:
            if self.expert_linears and not config.bnb_4bit_quant_storage.is_floating_point:
                # Such experts may cast their inputs to the dtype of their weights, as Switch's do.
                config.bnb_4bit_quant_storage = model.dtype
            for name in sorted({*self.expert_stacks, *(f"{name}.weight" for name in self.expert_linears)}):
                check_packable(name, model.get_parameter(name).dtype)

    def adopt(self, model: nn.Module) -> None:
        """Give `model`, whose stacks are packed, all that a model loaded by this quantizer has."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        self.postprocess_model(model)

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            # The checkpoint decides; its names have a prefix that a model without a head lacks.
            skipped = [] if hasattr(model, model.base_model_prefix) else config.llm_int8_skip_modules or []
            also_skipped = [name.removeprefix(f"{model.base_model_prefix}.") for name in skipped]
        else:
            layers = packable_layers(model, config.llm_int8_skip_modules)
            also_skipped = unquantised_linears(model, layers, config.llm_int8_skip_modules)
        # Now, on the names alone: an error during loading would be buried in transformers' load report.
        self.select(model, also_skipped)
        self.replace_linears_(model, device_map, **kwargs)

    def replace_linears_(self, model: nn.Module, device_map: Any = None, **kwargs: Any) -> None:
        """Put 4-bit layers, without weights yet, in the place of all linear layers that are to be packed."""
        config = self.quantization_config
        linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        if any(should_convert_module(name, config.llm_int8_skip_modules) for name in linears):
            super()._process_model_before_weight_loading(model, device_map, **kwargs)  # which warns where there is none
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.weight.blocksize = linear_block_size(module.in_features, config.bnb_4bit_blocksize)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.packed_names(model):
            if not is_packed(model.get_parameter(name)):
                raise OrdMoEModelError(
                    f"{name} was to be loaded in 4 bits but is {model.get_parameter(name).dtype}: the checkpoint's "
                    "weights for it were missing or of another shape. See the load report above."
                )
        for name in self.expert_stacks:
            experts, _ = get_module_from_name(model, name)
            # Biases, too: no gradient is computed of packed experts. A block that holds its own has a router beside.
            for parameter in experts.parameters(recurse=is_fused_experts(experts)):
                parameter.requires_grad_(False)
        unpack_in_forward_(model, self.readers)
        keep_linear4bit_layout(model)
        save_in_own_names(model)
        # No other experts function can read packed stacks.
        self.experts_implementation_before = model.get_experts_implementation()
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        model = super()._process_model_after_weight_loading(model, **kwargs)
        logger.info(f"Loaded {type(model).__name__} in 4 bits: {quantization_census(model).summary()}")
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Make `model` dense in `dtype`, by default its own, stack by stack; stock experts functions can run it."""
        check_no_adapter(model, "dequantise it")
        # transformers passes `config.dtype`, which it writes as a name when it saves the model.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        join_experts_in_ram_(model)
        unpack_(model, dtype)
        cast_rest_(model, dtype)
        model.config.dtype = dtype
        model.set_experts_implementation(self.experts_implementation_before)
        save_in_original_format(model)
        del model.is_loaded_in_4bit
        return model


class QuantizeLinearOrExperts(ConversionOps):
    """Packs a loaded tensor: expert stacks here, linear weights by transformers' own operation."""

    def __init__(self, hf_quantizer: MoeBnb4BitHfQuantizer, quantize_linear: ConversionOps):
        self.hf_quantizer, self.quantize_linear = hf_quantizer, quantize_linear

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **kwargs: Any) -> dict[str, Any]:
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
                mark_initialized(get_module_from_name(model, name)[0])
        return converted
