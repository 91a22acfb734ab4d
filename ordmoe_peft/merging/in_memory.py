"""Merging an adapter into a base that is packed in 4 bits, in memory.

The result is dense by default: every packed weight of the model, adapted or not, becomes an ordinary parameter, one
weight at a time, and its bytes are freed. Sums are in float32 and rounded once, to the dtype of the input embeddings:
the hidden states have that dtype, and a linear layer of another could not run on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from .._compat import is_repacked, keep_linear4bit_layout, save_in_original_format
from ..errors import OrdMoEModelError
from ..experts.expert_lora import ExpertLora, check_finite
from ..experts.weight_lora import WeightLora
from ..moe_model import without_wrappers
from ..quantization.dequantization import join_experts_in_ram_, packed_names, put_dense_
from ..quantization.offloaded import OffloadedParams4bit, offload
from ..quantization.storage import expert_unpacker, is_packed, logical_shape, pack_experts
from ..quantization.unpacked_forward import stop_unpacking_
from .delta_retention import DeltaRetention, RequantizationReport


def has_packed_weights(model: nn.Module) -> bool:
    """Whether any weight of `model` is packed in 4 bits."""
    return any(is_packed(parameter) for parameter in model.parameters())


@dataclass(frozen=True)
class BaseWeight:
    """A weight of the base, packed or not, and what is to be merged into it.

    Args:
        wrapped_names (`list[str]`): its name with PEFT's wrappers; several names where modules share it.
        owner (`nn.Module`), attribute (`str`): where it is.
        layer ([`~peft.tuners.lora.LoraLayer`], *optional*): what adapts it.
        adapters (`list[str]`): the adapters to merge; none without a layer.
    """

    wrapped_names: list[str]
    owner: nn.Module
    attribute: str
    layer: LoraLayer | None
    adapters: list[str]

    @property
    def name(self) -> str:
        """Its name in the unwrapped model."""
        return without_wrappers(self.wrapped_names[0])

    @property
    def value(self) -> torch.Tensor:
        return getattr(self.owner, self.attribute)

    def matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The matrices of a packed weight, one for each expert: before and after merging, both in float32."""
        delta_EOI = self._delta_of_stack()
        for index, matrix_OI in enumerate(unpacked(self.value)):
            base_OI = merged_OI = matrix_OI.float()
            if self.layer is not None and self.adapters:
                if isinstance(self.layer, ExpertLora):
                    merged_OI = base_OI + self.layer.delta(self.adapters, index)
                elif delta_EOI is not None:
                    merged_OI = base_OI + delta_EOI[index]
                else:
                    merged_OI = _merged_linear(self.layer, self.adapters, base_OI)
            yield base_OI, merged_OI

    def _delta_of_stack(self) -> torch.Tensor | None:
        """What LoRA on a stack outside transformers' experts interface adds to it: for all experts in one product."""
        if not isinstance(self.layer, WeightLora) or not self.adapters:
            return None
        first, *others = (self.layer.get_delta_weight(name) for name in self.adapters)
        return sum(others, first)

    def merged(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight that a packed one becomes, with the adapters in it."""
        shape = logical_shape(self.value)
        dense = torch.empty(shape, dtype=dtype, device=self.value.device)
        for rows, (_, merged_OI) in zip(dense.view(-1, *shape[-2:]), self.matrices(), strict=True):
            rows.copy_(merged_OI)
        return dense

    def check_finite(self, dtype: torch.dtype) -> None:
        """Raise [`OrdMoEModelError`] where the dense weight would not be finite."""
        for _, merged_OI in self.matrices() if self.adapters else ():
            check_finite(merged_OI.to(dtype), self.name, self.adapters)


def unpacked(packed: Params4bit) -> Iterator[torch.Tensor]:
    """The matrices of a packed weight: one for each expert of a stack, or that of a linear layer."""
    if len(logical_shape(packed)) == 3:
        return map(expert_unpacker(packed), range(logical_shape(packed)[0]))
    return iter([dequantize_bnb_weight(packed)])


def _merged_linear(layer: LoraLayer, adapters: list[str], weight_OI: torch.Tensor) -> torch.Tensor:
    for name in adapters:
        variant = layer.lora_variant.get(name)  # such as DoRA's
        if variant is None:
            weight_OI = weight_OI + layer.get_delta_weight(name)
        else:
            weight_OI = variant.merge_safe(layer, name, weight_OI)
    return weight_OI


def lora_layers(model: nn.Module) -> dict[tuple[nn.Module, str], LoraLayer]:
    """The LoRA layers on `model`, by the module and the attribute of the weight that each adapts."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return {(layer.get_base_layer(), getattr(layer, "parameter_name", "weight")): layer for layer in layers}


def packed_weights(model: nn.Module, adapter_names: list[str] | None) -> list[BaseWeight]:
    """All packed weights of `model`, each with what is to be merged into it."""
    layers, found = lora_layers(model), []
    for wrapped_names in packed_names(model):
        owner_name, _, attribute = wrapped_names[0].rpartition(".")
        owner = model.get_submodule(owner_name)
        layer = layers.get((owner, attribute))
        adapters = [] if layer is None else _adapters_to_merge(layer, adapter_names)
        found.append(BaseWeight(wrapped_names, owner, attribute, layer, adapters))
    return found


def _adapters_to_merge(layer: LoraLayer, adapter_names: list[str] | None) -> list[str]:
    return [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.lora_A]


def check_unshared(model: nn.Module) -> None:
    """See that no weight with LoRA on it is another module's, too.

    Raises:
        [`OrdMoEModelError`]: one is. Merging would change the other module, or add what the adapters of both learned.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(without_wrappers(name))
    for owner, attribute in lora_layers(model):
        shared = names.get(id(getattr(owner, attribute)), [])
        if len(shared) > 1:
            raise OrdMoEModelError(
                f"Cannot merge the adapter: {shared[0]} and {shared[1]} are one and the same weight, and merging into "
                "one would change the other. Keep the adapter beside the base."
            )


@torch.no_grad()
def merge_packed(
    model: PreTrainedModel,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
    requantize: bool = False,
) -> RequantizationReport | None:
    """Merge the adapters on `model`, whose base is packed, and leave the LoRA layers to be taken off.

    The arguments are those of `OrdMoEModel.merge_and_unload`. With `safe_merge`, no weight changes before all were
    checked; with `requantize`, weights without an adapter stay as they are, and the report is returned. A model whose
    experts stay in RAM is moved to the CPU, with a warning where it was elsewhere.
    """
    dtype = model.get_input_embeddings().weight.dtype
    weights = packed_weights(model, adapter_names)
    packed_layers = {weight.layer for weight in weights}
    other_layers = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer) and module not in packed_layers
    ]
    for weight in weights:
        check_mergeable(weight)
    join_experts_in_ram_(model)
    if safe_merge:
        for weight in weights:
            weight.check_finite(dtype)
        _check_factors_finite(model, other_layers, adapter_names)
    report = RequantizationReport() if requantize else None
    for weight in tqdm(weights, disable=not progressbar, desc="Merging 4-bit weights"):
        merge_packed_weight(model, weight, dtype, report)
    for layer in other_layers:
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    return report


def check_mergeable(weight: BaseWeight) -> None:
    """Raise [`OrdMoEModelError`] where a packed weight cannot take its adapters."""
    if is_repacked(weight.value):
        raise OrdMoEModelError(
            f"{weight.name} was evaluated on a CPU before the adapter was put on the model, for which bitsandbytes "
            "rearranged its bytes. Load the model anew, put the adapter on it, and merge."
        )
    if weight.layer is None:
        return
    if len(weight.adapters) > 1 and any(name in weight.layer.lora_variant for name in weight.adapters):
        raise OrdMoEModelError(
            f"Cannot merge {weight.adapters} together into {weight.name}: one of them is a variant of LoRA such as "
            "DoRA, which depends on the weight before the others. Merge one adapter."
        )
    has_bias = getattr(weight.owner, "bias", None) is not None
    if any(weight.layer.lora_bias[name] for name in weight.adapters) and not has_bias:
        raise OrdMoEModelError(
            f"Cannot merge {weight.adapters} into {weight.name}: `lora_bias` trained a bias, but there is none."
        )


def _check_factors_finite(model: nn.Module, layers: list[BaseTunerLayer], adapter_names: list[str] | None) -> None:
    names = {module: without_wrappers(name) for name, module in model.named_modules()}
    for layer in layers:
        if isinstance(layer, LoraLayer):
            for adapter in _adapters_to_merge(layer, adapter_names):
                for factor in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
                    check_finite(factor, names[layer], [adapter])


def merge_packed_weight(
    model: nn.Module, weight: BaseWeight, dtype: torch.dtype, report: RequantizationReport | None
) -> None:
    """Merge a packed weight's adapters into it: it becomes dense, or, with a report to add to, is packed again."""
    if report is None:
        dense = nn.Parameter(weight.merged(dtype), requires_grad=False)
        for name in weight.wrapped_names:
            put_dense_(model, name, dense)
    elif weight.adapters:
        report.weights.append(_repack(weight, dtype))
    if weight.layer is not None:
        for name in weight.adapters:
            if weight.layer.lora_bias[name]:
                weight.layer.get_base_layer().bias.data += weight.layer.scaling[name] * weight.layer.lora_B[name].bias


def _repack(weight: BaseWeight, dtype: torch.dtype) -> DeltaRetention:
    """Pack the merged weight as it was packed before, and say what is left of the delta."""
    new = packed_like(weight.value, weight.merged(dtype), weight.name)
    matrices = zip(weight.matrices(), unpacked(new), strict=True)
    retention = DeltaRetention.measure(weight.name, ((base, merged, after) for (base, merged), after in matrices))
    setattr(weight.owner, weight.attribute, new)
    if isinstance(weight.owner, Linear4bit):
        weight.owner.quant_state = new.quant_state
        keep_linear4bit_layout(weight.owner)
    return retention


def packed_like(old: Params4bit, dense: torch.Tensor, name: str) -> Params4bit:
    """`dense` packed by the recipe of `old`."""
    recipe = {"quant_type": old.quant_type, "quant_storage": old.quant_storage, "blocksize": old.blocksize}
    if dense.dim() == 3 or isinstance(old, OffloadedParams4bit):
        nested, dtype = old.compress_statistics, old.quant_state.dtype
        new = pack_experts(dense, name, use_double_quant=nested, compute_dtype=dtype, **recipe)
        return offload(new, old.ring) if isinstance(old, OffloadedParams4bit) else new
    new = Params4bit(dense, requires_grad=False, compress_statistics=old.compress_statistics, **recipe)
    new = new.to(dense.device)
    new.quant_state.dtype = old.quant_state.dtype
    return new


def forget_quantization(model: PreTrainedModel) -> None:
    """Take off the marks by which transformers and PEFT know a quantised model, and save it as its family is saved."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        save_in_original_format(model)
    stop_unpacking_(model)
    model.is_loaded_in_4bit = False
