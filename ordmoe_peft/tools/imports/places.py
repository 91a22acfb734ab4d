"""Where LoRA can be on a base, and which of a file's names stands for which place."""

import re
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from ...adapter.renaming import PREFIX
from ...adapter.targets import Target, find_targets
from ...errors import OrdMoEModelError
from ...moe_model import MoELayer, MoEModel, parameter_of
from ...quantization.storage import logical_shape


# Names of an expert's linear layers in files with keys for each expert → which of its matrices.
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Place:
    """A weight of the base that LoRA can be on.

    Args:
        weight (`str`): its name.
        role (`str`): what it is.
        shape (`tuple[int, int, int]`): E, O and I; E is 1 where it is one matrix.
        stack_of ([`MoELayer`], *optional*): of a stack of experts, its layer.
        is_transposed (`bool`, defaults to `False`): the stack is stored as (E, I, O).
    """

    weight: str
    role: str
    shape: tuple[int, int, int]
    stack_of: MoELayer | None = None
    is_transposed: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether it is of transformers' experts interface, which says where gate and up are."""
        return self.stack_of is not None and self.stack_of.kind == "fused"


@dataclass(frozen=True)
class Meaning:
    """What a module that a file names stands for.

    Args:
        owner (`str`): the base's module.
        expert (`int`, *optional*), part (`str`, *optional*): of a key of one expert, which, and its matrix.
        is_inner (`bool`, *optional*): of keys of fused experts, whether it is PEFT's inner wrapper.
    """

    owner: str
    expert: int | None = None
    part: str | None = None
    is_inner: bool | None = None


class Places:
    """The places of LoRA on a base.

    Args:
        model ([`~transformers.PreTrainedModel`]): the base, on the meta device perhaps.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        mapping = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        # Name of a stack → its layer.
        self.layers = {
            f"{layer.experts_name}.{name}": layer for layer in MoEModel.of(model).layers for name in layer.projections
        }
        self.by_weight = {place.weight: place for place in map(self._place, find_targets(model))}
        # Name of a module → its stacks, in the order in which PEFT wraps them: up (with the gate), down.
        self.stacks: dict[str, list[Place]] = {}
        for place in self.by_weight.values():
            if place.stack_of is not None:
                self.stacks.setdefault(place.weight.rpartition(".")[0], []).append(place)
        matrices = (place.weight for place in self.by_weight.values() if place.stack_of is None)
        self.modules = {name.removesuffix(".weight") for name in matrices}

    def _place(self, target: Target) -> Place:
        weight = target.name if target.is_parameter else f"{target.name}.weight"
        shape = tuple(logical_shape(parameter_of(self.model, weight)))
        if len(shape) == 2:
            return Place(weight, target.role, (1, *shape))
        layer = self.layers[weight]
        is_transposed = getattr(layer.experts, "is_transposed", False)
        num_experts, rows, columns = shape
        sides = (columns, rows) if is_transposed else (rows, columns)
        return Place(weight, target.role, (num_experts, *sides), layer, is_transposed)

    def meaning(self, module: str) -> Meaning:
        """What `module` of a file stands for, by the base's names or by those of its checkpoints.

        Raises:
            [`OrdMoEModelError`]: nothing on this base.
        """
        for name in (module, apply_renamings(f"{module}.weight", self.renamings).removesuffix(".weight")):
            if name in self.modules:
                return Meaning(name)
            if name in self.stacks:
                return Meaning(name, is_inner=False)
            if name.removesuffix(".base_layer") in self.stacks:
                return Meaning(name.removesuffix(".base_layer"), is_inner=True)
            found = re.fullmatch(r"(?P<owner>.+)\.(?P<expert>\d+)\.(?P<part>\w+)", name)
            stacks = self.stacks.get(found["owner"], []) if found else []
            if found and found["part"] in PARTS and stacks and all(place.is_fused for place in stacks):
                return Meaning(found["owner"], int(found["expert"]), PARTS[found["part"]])
        raise OrdMoEModelError(
            f"The adapter has LoRA on {module}, which {type(self.model).__name__} does not have, or which no role of "
            "OrdMoE covers. Give the base that it was trained on."
        )


def split_key(key: str) -> tuple[str, str]:
    """The module and the factor, `A` or `B`, of a tensor's name.

    Raises:
        [`OrdMoEModelError`]: it is none of LoRA's two factors.
    """
    found = _KEY.fullmatch(key)
    if found is None:
        raise OrdMoEModelError(
            f"The adapter has the tensor {key}, which is none of LoRA's two factors as PEFT names them. Only plain "
            "LoRA is imported."
        )
    return found["module"], found["factor"]
