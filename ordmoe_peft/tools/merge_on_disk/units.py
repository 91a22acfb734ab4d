"""What is done to each tensor of a checkpoint: it is copied, or part of a weight that the adapter is merged into.

checkpoint ─ read ─▶ tensors ─ to_parameters ─▶ parameters ─ put ─▶ ┌─────────────────┐
                        │                                           │ WeightlessModel │ merge
shard  ◀────────────────┴────── to_tensors ◀─── parameters ◀─ take ─└─────────────────┘
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import ParamWrapper
from transformers.core_model_loading import dot_natural_key

from ...errors import OrdMoEModelError
from ...merging.delta_retention import RequantizationReport
from ...merging.in_memory import BaseWeight, check_mergeable, merge_packed_weight
from ...quantization.quantizer import MoeBnb4BitHfQuantizer
from ...quantization.serialization import saved_tensors
from ...quantization.storage import is_packed
from .checkpoint import Checkpoint
from .parameter_sources import ParameterSource
from .weightless_model import WeightlessModel


@dataclass(frozen=True)
class MergeUnit:
    """Tensors that are in memory and go into one shard together.

    Args:
        names (`list[str]`): the checkpoint's tensors.
        sources (`list` of [`ParameterSource`]): the parameters that they make; none where they are copied.
    """

    names: list[str]
    sources: list[ParameterSource]


def plan_units(
    checkpoint: Checkpoint, model: WeightlessModel, sources: dict[str, ParameterSource], also_changed: Iterable[str]
) -> list[MergeUnit]:
    """The smallest units for the parameters that the adapter changes and those that are `also_changed`.

    All other tensors are copied, each a unit. Units come in the checkpoint's order.

    Raises:
        [`OrdMoEModelError`]: the adapter adapts a parameter that the checkpoint has no tensor for.
    """
    together = {sources[name]: [sources[name]] for name in also_changed if name in sources}
    for weight in model.adapted:
        names = _changed_by_merging(weight)
        missing = [name for name in names if name not in sources]
        if missing:
            raise OrdMoEModelError(f"The adapter changes {missing[0]}, for which {checkpoint.folder} has no tensor.")
        # These parameters, and those that share a source with one of them.
        group = [other for name in names for other in together.get(sources[name], [sources[name]])]
        group = list(dict.fromkeys(group))
        together.update(dict.fromkeys(group, group))
    groups = {id(group): group for group in together.values()}.values()
    units = [MergeUnit([name for source in group for name in source.names], group) for group in groups]
    changed = {name for unit in units for name in unit.names}
    units += [MergeUnit([name], []) for name in checkpoint.files if name not in changed]
    return sorted(units, key=lambda unit: min(map(dot_natural_key, unit.names)))


def _changed_by_merging(weight: BaseWeight) -> list[str]:
    """A stack or a router's weight, or all parameters of a linear layer, whose bias LoRA may train."""
    if isinstance(weight.layer, ParamWrapper):
        return [weight.name]
    owner_name = weight.name.rpartition(".")[0]
    return [f"{owner_name}.{attribute}" for attribute, _ in weight.owner.named_parameters()]


@dataclass
class UnitMerger:
    """Merges an adapter into the units of a checkpoint, one by one.

    Args:
        checkpoint ([`Checkpoint`]): where the tensors are.
        model ([`WeightlessModel`]): what merges into them.
        units (`list` of [`MergeUnit`]): all of them.
        quantizer ([`MoeBnb4BitHfQuantizer`], *optional*): packs weights.
        rounded (`set[str]`): the parameters that it packs before anything is merged into them.
        stored_packed (`set[str]`): the tensors that are parts of weights in 4 bits.
        dtype (`torch.dtype`, *optional*): of floating-point tensors that are written; each one's own by default.
        report ([`RequantizationReport`], *optional*): with one, to which it adds, packed weights stay packed.
    """

    checkpoint: Checkpoint
    model: WeightlessModel
    units: list[MergeUnit]
    quantizer: MoeBnb4BitHfQuantizer | None
    rounded: set[str]
    stored_packed: set[str]
    dtype: torch.dtype | None
    report: RequantizationReport | None

    @torch.no_grad()
    def merged(self, unit: MergeUnit) -> dict[str, torch.Tensor]:
        """The tensors of `unit` as they are to be written."""
        tensors = self.checkpoint.read(unit.names)
        if self.dtype is not None:
            for name in tensors.keys() - self.stored_packed:
                if tensors[name].is_floating_point():
                    tensors[name] = tensors[name].to(self.dtype)
        dtypes: dict[str, torch.dtype] = {}
        for source in unit.sources:
            dtypes |= self._put(source, {name: tensors.pop(name) for name in source.names})
        for name, dtype in dtypes.items():
            self._merge(self.model.weights[name], dtype)
        for source in unit.sources:
            tensors |= self._take(source)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def _put(self, source: ParameterSource, tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
        """Give the model the parameters that the tensors make, and say which dtype each has when it is dense."""
        parameters, dtypes = source.to_parameters(tensors), {}
        tensors.clear()
        for name in source.parameters:
            value = parameters.pop(name)
            dtypes[name] = value.dtype
            if source.is_packed:
                dtypes[name] = self.dtype or self.model.model.config.dtype or torch.bfloat16
            if self.quantizer is not None and name in self.rounded:
                value = self.quantizer.get_quantize_ops().convert({name: value}, model=source.skeleton)[name]
            elif len(source.names) == 1:  # then it may still be pages of the file, which are not ours to write to
                value = value.clone()
            self.model.put(name, value)
        return dtypes

    def _merge(self, weight: BaseWeight, dtype: torch.dtype) -> None:
        if is_packed(weight.value):
            check_mergeable(weight)
            weight.check_finite(dtype)
            merge_packed_weight(self.model.model, weight, dtype, self.report)
        elif weight.layer is not None:
            weight.layer.merge(safe_merge=True)

    def _take(self, source: ParameterSource) -> dict[str, torch.Tensor]:
        """The model's parameters as tensors to write; beside packed ones, all under the model's own names."""
        parameters = {name: self.model.take(name) for name in source.parameters}
        if self.report is None:
            return source.to_tensors(parameters)
        return {part: tensor for name in parameters for part, tensor in saved_tensors(name, parameters[name]).items()}
