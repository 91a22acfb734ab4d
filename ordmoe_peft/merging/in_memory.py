"""Merging an adapter into a base that is packed in 4 bits, in memory.

The result is dense by default: every packed weight of the model, adapted or not, becomes an ordinary parameter, one
weight at a time, each freeing its bytes. Sums are in float32 and rounded once, to the dtype of the input embeddings,
which is what the hidden states of the model are in; a dense linear layer of another dtype could not run on them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from .._compat import is_repacked, keep_linear4bit_layout, save_in_original_format
from ..errors import OrdMoEModelError
from ..experts.expert_lora import ExpertLora, check_finite
from ..moe_model import without_wrappers
from ..quantization.dequantization import packed_names, put_dense_
from ..quantization.storage import expert_unpacker, is_packed, logical_shape, pack_experts
from .delta_retention import RequantizationReport, Survival, SurvivalSum


def has_packed_weights(model: nn.Module) -> bool:
    """Whether any weight of `model` is packed in 4 bits."""
    return any(is_packed(parameter) for parameter in model.parameters())


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight of a model, and the LoRA layer on it, if there is one.

    Args:
        wrapped_name (`str`): its name, with PEFT's wrappers.
        owner (`nn.Module`), attribute (`str`): where it is.
        layer ([`~peft.tuners.lora.LoraLayer`], *optional*): what adapts it.
        adapters (`list[str]`): the adapters to merge.
        other_names (`list[str]`): under which other modules have it, too.
    """

    wrapped_name: str
    owner: nn.Module
    attribute: str
    layer: LoraLayer | None
    adapters: list[str]
    other_names: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its name in the unwrapped model."""
        return without_wrappers(self.wrapped_name)

    @property
    def packed(self) -> Params4bit:
        return getattr(self.owner, self.attribute)

    def matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Its matrices, one for each expert, as they are and as they are with the adapters, in float32."""
        count, unpack = unpacker(self.packed)
        for index in range(count):
            base_OI = unpack(index).float()
            if not self.adapters:
                yield base_OI, base_OI
            elif isinstance(self.layer, ExpertLora):
                yield base_OI, base_OI + self.layer.delta(self.adapters, index)
            else:
                yield base_OI, _merged_linear(self.layer, self.adapters, base_OI)

    def merged(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight with the adapters in it."""
        shape = logical_shape(self.packed)
        dense = torch.empty(shape, dtype=dtype, device=self.packed.device)
        for rows, (_, merged_OI) in zip(dense.view(-1, *shape[-2:]), self.matrices(), strict=True):
            rows.copy_(merged_OI)
        return dense

    def check_finite(self, dtype: torch.dtype) -> None:
        """Raise [`OrdMoEModelError`] where the dense weight would not be finite."""
        for _, merged_OI in self.matrices() if self.adapters else ():
            check_finite(merged_OI.to(dtype), self.name, self.adapters)


def unpacker(packed: Params4bit) -> tuple[int, Callable[[int], torch.Tensor]]:
    """How many matrices a packed weight holds, and a function that unpacks one."""
    shape = logical_shape(packed)
    return (shape[0], expert_unpacker(packed)) if len(shape) == 3 else (1, lambda _: dequantize_bnb_weight(packed))


def _merged_linear(layer: LoraLayer, adapters: list[str], weight_OI: torch.Tensor) -> torch.Tensor:
    for name in adapters:
        variant = layer.lora_variant.get(name)  # such as DoRA's
        if variant is None:
            weight_OI = weight_OI + layer.get_delta_weight(name)
        else:
            weight_OI = variant.merge_safe(layer, name, weight_OI)
    return weight_OI


def packed_weights(model: nn.Module, adapter_names: list[str] | None) -> list[PackedWeight]:
    """All packed weights of `model`, each with what is to be merged into it."""
    layers = {}
    for module in model.modules():
        if isinstance(module, ExpertLora):
            layers[module.get_base_layer(), module.parameter_name] = module
        elif isinstance(module, LoraLinear4bit):
            layers[module.get_base_layer(), "weight"] = module
    found = []
    for wrapped_name, *others in packed_names(model):
        owner_name, _, attribute = wrapped_name.rpartition(".")
        owner = model.get_submodule(owner_name)
        layer = layers.get((owner, attribute))
        names = [] if layer is None else check_adapters_to_merge(layer, adapter_names)
        adapters = [name for name in names if name in layer.lora_A]
        found.append(PackedWeight(wrapped_name, owner, attribute, layer, adapters, others))
    return found


def check_unshared(model: nn.Module) -> None:
    """See that no weight with LoRA on it is another module's, too.

    Raises:
        [`OrdMoEModelError`]: one is. Merging would change the other module, or add what the adapters of both learned.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(without_wrappers(name))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
            shared = names.get(id(weight), [])
            if len(shared) > 1:
                raise OrdMoEModelError(
                    f"Cannot merge the adapter: {shared[0]} and {shared[1]} are one and the same weight, and merging "
                    "into one would change the other. Keep the adapter beside the base."
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

    Args:
        model ([`~transformers.PreTrainedModel`]): with PEFT's layers in it; changed in place.
        progressbar (`bool`, defaults to `False`): show one bar for the packed weights.
        safe_merge (`bool`, defaults to `False`): look for NaN and infinity first, before anything changes.
        adapter_names (`list[str]`, *optional*): the active adapters by default.
        requantize (`bool`, defaults to `False`): pack the merged weights again, by the recipe that each was packed by,
            and leave the others packed. Without it, no weight of the model is packed afterwards.

    Returns:
        [`RequantizationReport`] with `requantize`, else `None`.
    """
    dtype = model.get_input_embeddings().weight.dtype
    weights = packed_weights(model, adapter_names)
    check_mergeable(weights)
    if safe_merge:
        _check_all_finite(model, weights, dtype, adapter_names)
    report = RequantizationReport()
    for weight in tqdm(weights, disable=not progressbar, desc="Merging 4-bit weights"):
        if not requantize:
            dense = nn.Parameter(weight.merged(dtype), requires_grad=False)
            for name in (weight.wrapped_name, *weight.other_names):
                put_dense_(model, name, dense)
        elif weight.adapters:
            report.weights.append(repack(weight, dtype))
        if weight.adapters:
            merge_bias(weight)
    packed_layers = {weight.layer for weight in weights}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module not in packed_layers:
            module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    return report if requantize else None


def check_mergeable(weights: list[PackedWeight]) -> None:
    for weight in weights:
        if is_repacked(weight.packed):
            raise OrdMoEModelError(
                f"{weight.name} was evaluated on a CPU before the adapter was put on the model, for which bitsandbytes "
                "rearranged its bytes. Load the model anew, put the adapter on it, and merge."
            )
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


def _check_all_finite(
    model: nn.Module, weights: list[PackedWeight], dtype: torch.dtype, adapter_names: list[str] | None
) -> None:
    for weight in weights:
        weight.check_finite(dtype)
    packed_layers = {weight.layer for weight in weights}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module not in packed_layers:
            for adapter in [each for each in check_adapters_to_merge(module, adapter_names) if each in module.lora_A]:
                for factor in (module.lora_A[adapter].weight, module.lora_B[adapter].weight):
                    check_finite(factor, without_wrappers(name), [adapter])


def repack(weight: PackedWeight, dtype: torch.dtype) -> Survival:
    """Pack the merged weight as it was packed before, and say what is left of the delta."""
    old = weight.packed
    new = packed_like(old, weight.merged(dtype), weight.name)
    _, unpack = unpacker(new)
    survival = SurvivalSum()
    for index, (base_OI, merged_OI) in enumerate(weight.matrices()):
        survival.add(base_OI, merged_OI, unpack(index))
    setattr(weight.owner, weight.attribute, new)
    if isinstance(weight.owner, Linear4bit):
        weight.owner.quant_state = new.quant_state
        keep_linear4bit_layout(weight.owner)
    return survival.survival(weight.name)


def packed_like(old: Params4bit, dense: torch.Tensor, name: str) -> Params4bit:
    """`dense` packed by the recipe of `old`."""
    if dense.dim() == 3:
        return pack_experts(
            dense,
            name,
            quant_type=old.quant_type,
            use_double_quant=old.compress_statistics,
            compute_dtype=old.quant_state.dtype,
            quant_storage=old.quant_storage,
            blocksize=old.blocksize,
        )
    new = Params4bit(
        dense,
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    ).to(dense.device)
    new.quant_state.dtype = old.quant_state.dtype
    return new


def merge_bias(weight: PackedWeight) -> None:
    """Add what `lora_bias` trained to the linear layer's bias."""
    for name in weight.adapters:
        if weight.layer.lora_bias[name]:
            bias = weight.layer.get_base_layer().bias
            bias.data += weight.layer.scaling[name] * weight.layer.lora_B[name].bias


def forget_quantization(model: PreTrainedModel) -> None:
    """Take off the marks by which transformers and PEFT know a quantised model, and save it as its family is saved."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        save_in_original_format(model)
    model.is_loaded_in_4bit = False
