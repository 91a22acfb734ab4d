"""Which tensors of a checkpoint make which parameters of a model, and back.

A checkpoint's names and layouts are often not the model's: two thirds of the MoE families keep a tensor for each expert
on disk, which transformers fuses while it loads. The rules are transformers' own (`transformers/conversion_mapping.py`,
applied in `transformers/core_model_loading.py`), so any form that `from_pretrained` reads can be read here, and what is
written goes under the names that were read.
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
from ...quantization.config import MoeBitsAndBytesConfig
from ...quantization.quantizer import MoeBnb4BitHfQuantizer
from ...quantization.storage import is_packed


@dataclass(eq=False)
class Source:
    """Tensors of a checkpoint that are converted together, and the parameters that come of them.

    Args:
        skeleton ([`~transformers.PreTrainedModel`]): the model, whose shapes and configuration conversions ask for.
        target (`str`): the parameter, or the first of several.
        converter ([`~transformers.core_model_loading.WeightConverter`], *optional*): what is done to the tensors;
            nothing, where a tensor is a parameter.
        tensors (`dict[str, list[str]]`): for each of the converter's patterns, the tensors' names in order.
        inner_names (`dict[str, str]`): the tensors' names in the converter's terms → in the checkpoint's.
    """

    skeleton: PreTrainedModel = field(repr=False)
    target: str
    converter: WeightConverter | None
    tensors: dict[str, list[str]] = field(default_factory=dict)
    inner_names: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The tensors' names in the checkpoint."""
        return [name for names in self.tensors.values() for name in names]

    def to_parameters(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that the tensors make."""
        if self.converter is None:
            return {self.target: tensors[self.names[0]]}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.tensors.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, tensors[name])
        return _convert(converter, self.target, self.skeleton)

    def to_tensors(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors that make the parameters: the converse of `to_parameters`."""
        if self.converter is None:
            return {self.names[0]: parameters[self.target]}
        converter = self.converter.reverse_transform()
        for name, parameter in parameters.items():
            target, pattern = converter.rename_source_key(name)
            converter.add_tensor(target, name, pattern, parameter)
        prefix = f"{self.skeleton.base_model_prefix}."
        converted = _convert(converter, target, self.skeleton)
        return {self.inner_names.get(name.removeprefix(prefix), name): value for name, value in converted.items()}


@dataclass(eq=False)
class PackedSource(Source):
    """Tensors of a checkpoint in 4 bits that make one packed weight.

    What becomes of it is written under the model's own name, which transformers reads beside the family's form.
    """

    def to_parameters(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parameters = super().to_parameters(tensors)
        if not is_packed(parameters[self.target]):
            raise OrdMoEModelError(
                f"The checkpoint says that {self.target} is in 4 bits, but lacks its scales: it is not as "
                "`save_pretrained` wrote it."
            )
        return parameters

    def to_tensors(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.target: parameters[self.target]}


def _convert(converter: WeightConverter, target: str, skeleton: PreTrainedModel) -> dict[str, torch.Tensor]:
    converted = converter.convert(target, model=skeleton, config=skeleton.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def find_sources(
    skeleton: PreTrainedModel,
    names: Iterable[str],
    recipe: MoeBitsAndBytesConfig | None = None,
) -> list[Source]:
    """What each parameter of `skeleton` is made of; tensors that make none are left out.

    Follows `convert_and_load_state_dict_in_model` (`transformers/core_model_loading.py`).

    Args:
        skeleton ([`~transformers.PreTrainedModel`]): the model, without content; changed where there is a recipe.
        names (`Iterable[str]`): the checkpoint's tensors.
        recipe ([`MoeBitsAndBytesConfig`], *optional*): how the checkpoint is stored in 4 bits, if it is.
    """
    quantizer = None
    if recipe is not None:
        quantizer = MoeBnb4BitHfQuantizer(recipe, pre_quantized=True)
        quantizer.preprocess_model(model=skeleton, device_map=None)
    mapping = get_model_conversion_mapping(skeleton, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    sources: dict[str, Source] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            continue
        kind = PackedSource if recipe is not None and pattern is not None else Source
        source = sources.setdefault(target, kind(skeleton, target, by_pattern.get(pattern)))
        source.tensors.setdefault(pattern or name, []).append(name)
        source.inner_names[apply_renamings(name, renamings).removeprefix(f"{prefix}.")] = name
    return list(sources.values())


def check_source(source: Source, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """See on shapes alone that the tensors make the parameters that the model has, and that the way back is known.

    Returns:
        `dict` from the parameters' names to tensors without content.

    Raises:
        [`OrdMoEModelError`]: the shapes are another model's, or the converted parameters cannot be written back.
    """
    if isinstance(source, PackedSource):
        return {source.target: source.skeleton.get_parameter(source.target)}
    parameters = source.to_parameters({name: torch.empty(shapes[name], device="meta") for name in source.names})
    expected = source.skeleton.state_dict()
    for name, parameter in parameters.items():
        if name not in expected or parameter.shape != expected[name].shape:
            wanted = list(expected[name].shape) if name in expected else "nothing of that name"
            raise OrdMoEModelError(
                f"The checkpoint's {source.names[0]} makes {name} of shape {list(parameter.shape)}, but "
                f"{type(source.skeleton).__name__} has {wanted}. Its config.json is not that of its weights."
            )
    # Copies, since conversions consume what they are given.
    back = source.to_tensors(dict(parameters))
    if set(back) != set(source.names) or any(back[name].shape != shapes[name] for name in back):
        raise OrdMoEModelError(
            f"{source.target} is stored as {source.names[0]} (and {len(source.names) - 1} more), a form that "
            "transformers can read and not write. Load the base with transformers, save it again, and merge into that."
        )
    return parameters
