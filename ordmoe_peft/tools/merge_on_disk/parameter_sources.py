"""Which tensors of a checkpoint make which parameters of a model, and back.

A checkpoint's names and layouts are often not the model's: two thirds of the MoE families keep a tensor for each expert
on disk, which transformers fuses while it loads:

    mlp.experts.0.gate_proj.weight  ┐
    mlp.experts.0.up_proj.weight    ├ one ParameterSource ⇄ mlp.experts.gate_up_proj
    mlp.experts.1.gate_proj.weight  │
    …                               ┘

The rules are transformers' own (`transformers/conversion_mapping.py`, applied in `transformers/core_model_loading.py`),
so any form that `from_pretrained` reads can be read here, and what is written goes under the names that were read.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from ...errors import OrdMoEModelError
from ...quantization.quantizer import MoeBnb4BitHfQuantizer
from ...quantization.storage import is_packed
from .checkpoint import Checkpoint


@dataclass(eq=False)
class ParameterSource:
    """Tensors of a checkpoint that are converted together, and the parameters that they make.

    Args:
        skeleton ([`~transformers.PreTrainedModel`]): the model, whose shapes and configuration conversions ask for.
        target (`str`): the parameter, or the first of several.
        converter ([`~transformers.core_model_loading.WeightConverter`], *optional*): what is done to the tensors;
            nothing, where a tensor is a parameter.
        is_packed (`bool`): the tensors are one weight in 4 bits. What it becomes is written under the model's own name,
            which transformers reads beside the family's form.
        patterns (`dict[str, str]`): the tensors' names in the checkpoint → the converter's pattern for each.
        names_by_inner (`dict[str, str]`): the tensors' names in the converter's terms → in the checkpoint's.
        parameters (`list[str]`): the names of all parameters.
    """

    skeleton: PreTrainedModel = field(repr=False)
    target: str
    converter: WeightConverter | None
    is_packed: bool
    patterns: dict[str, str] = field(default_factory=dict)
    names_by_inner: dict[str, str] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The tensors' names in the checkpoint."""
        return list(self.patterns)

    def to_parameters(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that the tensors make."""
        if self.converter is None:
            return {self.target: tensors[self.names[0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.patterns.items():
            converter.add_tensor(self.target, name, pattern, tensors[name])
        parameters = self._convert(converter, self.target)
        if self.is_packed and not is_packed(parameters[self.target]):
            raise OrdMoEModelError(
                f"The checkpoint says that {self.target} is in 4 bits, but lacks its scales: it is not as "
                "`save_pretrained` wrote it."
            )
        return parameters

    def to_tensors(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors that make the parameters: the converse of `to_parameters`."""
        if self.is_packed:
            return dict(parameters)
        if self.converter is None:
            return {self.names[0]: parameters[self.target]}
        converter = self.converter.reverse_transform()
        for name, parameter in parameters.items():
            target, pattern = converter.rename_source_key(name)
            converter.add_tensor(target, name, pattern, parameter)
        prefix = f"{self.skeleton.base_model_prefix}."
        converted = self._convert(converter, target)
        return {self.names_by_inner.get(name.removeprefix(prefix), name): value for name, value in converted.items()}

    def _convert(self, converter: WeightConverter, target: str) -> dict[str, torch.Tensor]:
        converted = converter.convert(target, model=self.skeleton, config=self.skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def check(self, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
        """Note the parameters; see that the model has them (`expected`), and that they make the same tensors again.

        Raises:
            [`OrdMoEModelError`]: the shapes are another model's, or the converted parameters cannot be written back.
        """
        parameters = self.to_parameters(tensors)
        self.parameters = list(parameters)
        for name, parameter in parameters.items():
            if name not in expected or parameter.shape != expected[name].shape:
                wanted = list(expected[name].shape) if name in expected else "nothing of that name"
                raise OrdMoEModelError(
                    f"The checkpoint's {self.names[0]} makes {name} of shape {list(parameter.shape)}, but "
                    f"{type(self.skeleton).__name__} has {wanted}. Its config.json is not that of its weights."
                )
        back = self.to_tensors(parameters)
        if set(back) != set(self.names) or any(back[name].shape != tensors[name].shape for name in back):
            raise OrdMoEModelError(
                f"{self.target} is stored as {self.names[0]} (and {len(self.names) - 1} more), a form that "
                "transformers can read and not write. Load the base with transformers, save it again, and merge into "
                "that."
            )


def read_parameters(checkpoint: Checkpoint, sources: Iterable[ParameterSource]) -> dict[str, torch.Tensor]:
    """The parameters that `sources` make of the tensors in `checkpoint`, by name; each is read once."""
    read: dict[str, torch.Tensor] = {}
    for source in dict.fromkeys(sources):
        read |= source.to_parameters(checkpoint.read(source.names))
    return read


def find_sources(
    skeleton: PreTrainedModel, tensors: Mapping[str, torch.Tensor], quantizer: MoeBnb4BitHfQuantizer | None
) -> dict[str, ParameterSource]:
    """For each parameter of `skeleton`, what it is made of; tensors that make none are left out.

    Follows `convert_and_load_state_dict_in_model` (`transformers/core_model_loading.py`).

    Args:
        skeleton ([`~transformers.PreTrainedModel`]): the model, on the meta device.
        tensors (`Mapping`): the checkpoint's tensors by name, on the meta device.
        quantizer ([`MoeBnb4BitHfQuantizer`], *optional*): of a checkpoint that is stored in 4 bits.
    """
    mapping = get_model_conversion_mapping(skeleton, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    sources: dict[str, ParameterSource] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            continue
        is_packed_part = quantizer is not None and pattern is not None
        new = ParameterSource(skeleton, target, by_pattern.get(pattern), is_packed_part)
        source = sources.setdefault(target, new)
        source.patterns[name] = pattern or name
        source.names_by_inner[apply_renamings(name, renamings).removeprefix(f"{prefix}.")] = name
    for source in sources.values():
        if source.is_packed:
            source.parameters = [source.target]  # whose shape is known when its scales are read
        else:
            source.check(tensors, expected)
    return {name: source for source in sources.values() for name in source.parameters}
