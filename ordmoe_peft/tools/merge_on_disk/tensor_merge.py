"""What becomes of tensors of a checkpoint that an adapter is merged into: read, made parameters, merged, taken back."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer

from ...merging.delta_retention import RequantizationReport
from ...merging.in_memory import check_mergeable, merge_bias, repack
from ...quantization.serialization import saved_tensors
from .checkpoint import Checkpoint
from .parameter_sources import PackedSource, Source
from .requantization import Packing
from .units import Work
from .weightless_model import Host


@dataclass
class TensorMerge:
    """What the tensors of a checkpoint become.

    Args:
        checkpoint ([`Checkpoint`]): where they are.
        host ([`Host`]): what merges into them.
        packing ([`Packing`], *optional*): packs weights before anything is merged into them.
        dtype (`torch.dtype`, *optional*): of floating-point tensors that are written; each one's own by default.
        packed (`set[str]`): the tensors that are parts of weights in 4 bits.
        packed_dtype (`torch.dtype`): of dense weights that come out of these.
        report ([`RequantizationReport`], *optional*): with one, to which it adds, packed weights stay packed.
    """

    checkpoint: Checkpoint
    host: Host
    packing: Packing | None
    dtype: torch.dtype | None
    packed: set[str]
    packed_dtype: torch.dtype
    report: RequantizationReport | None

    @torch.no_grad()
    def finished(self, work: Work) -> dict[str, torch.Tensor]:
        """The tensors of `work` as they are to be written."""
        tensors = self.checkpoint.read(work.names)
        if self.dtype is not None:
            for name in tensors.keys() - self.packed:
                if tensors[name].is_floating_point():
                    tensors[name] = tensors[name].to(self.dtype)
        made = [self._put(source, {name: tensors.pop(name) for name in source.names}) for source in work.sources]
        merged = {self._merge_packed(name, dtype) for dtypes in made for name, dtype in dtypes.items()}
        for layer in work.layers:
            if layer not in merged:
                layer.merge(safe_merge=True)
        for source, dtypes in zip(work.sources, made, strict=True):
            tensors |= self._taken(source, dtypes)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def _put(self, source: Source, tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
        """Give the host the parameters that the tensors make; the dtype of each as a dense one."""
        is_one, parameters, dtypes = len(source.names) == 1, source.to_parameters(tensors), {}
        tensors.clear()
        for name in list(parameters):
            value = parameters.pop(name)
            dtypes[name] = self.packed_dtype if isinstance(source, PackedSource) else value.dtype
            if self.packing is not None and name in self.packing.names:
                value = self.packing(name, value)
            elif is_one:  # then it may still be pages of the file, which are not ours to write to
                value = value.clone()
            self.host.put(name, value)
        return dtypes

    def _merge_packed(self, name: str, dtype: torch.dtype) -> LoraLayer | None:
        """Merge into the parameter `name` if it is packed, and return the layer that did."""
        weight = self.host.packed_weight(name)
        if weight is None:
            return None
        check_mergeable([weight])
        weight.check_finite(dtype)
        if self.report is None:
            self.host.put(name, weight.merged(dtype))
        elif weight.adapters:
            self.report.weights.append(repack(weight, dtype))
        if weight.adapters:
            merge_bias(weight)
        return weight.layer

    def _taken(self, source: Source, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The host's parameters `names` as tensors to write: packed ones are read under the model's names alone."""
        parameters = {name: self.host.take(name) for name in names}
        if self.report is None:
            return source.to_tensors(parameters)
        return {part: tensor for name in names for part, tensor in saved_tensors(name, parameters[name]).items()}
