"""Fused stacks packed expert by expert while they are read, so that loading never holds one of them whole.

Two thirds of the families keep one tensor per expert and projection on disk. transformers' converters first stack all
of them, then concatenate gate and up, which takes twice the stack at once. The operation here runs the same converter
for one expert at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist


class PackWhileMerging(ConversionOps):
    """Merges per-expert tensors into a fused stack; packs a stack that is to be packed, one expert at a time.

    Args:
        operations (`list[ConversionOps]`): the converter's own.
        pack (`Callable`): a sized iterable of matrices and the stack's name → the packed stack.
        is_stack (`Callable`): whether the parameter of a name is a stack to pack.
    """

    def __init__(self, operations: list[ConversionOps], pack: Callable, is_stack: Callable[[str], bool]):
        self.operations, self.pack, self.is_stack = operations, pack, is_stack

    def __deepcopy__(self, memo: dict) -> "PackWhileMerging":
        """Itself: transformers copies the converter for each tensor on disk, and this one refers to the quantizer."""
        return self

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, Any]:
        def merge(tensors: dict[str, Any]) -> dict[str, Any]:
            for operation in self.operations:
                tensors = operation.convert(tensors, full_layer_name=full_layer_name, **kwargs)
            return tensors

        if not self.is_stack(full_layer_name):
            return merge(input_dict)
        return {kwargs["target_patterns"][0]: self.pack(MergedExperts(input_dict, merge), full_layer_name)}


class MergedExperts:
    """The matrices of a stack. Each is made of its expert's tensors when its turn comes, and those are then let go.

    Args:
        tensors (`dict[str, list[torch.Tensor]]`): source pattern → one tensor per expert; emptied.
        merge (`Callable`): the same with one tensor in each list → a stack of one expert.
    """

    def __init__(self, tensors: dict[str, list[torch.Tensor]], merge: Callable[[dict], dict]):
        self.tensors, self.merge = tensors, merge
        self.num_experts = min(len(per_expert) for per_expert in tensors.values())

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.num_experts):
            (stack_1OI,) = self.merge({name: [per_expert.pop(0)] for name, per_expert in self.tensors.items()}).values()
            yield stack_1OI[0]


def packs_by_expert(operations: list[ConversionOps]) -> bool:
    """Whether `operations` stack experts in the first dimension and treat each by itself after that."""
    first, *others = operations
    return (
        type(first) is MergeModulelist
        and first.dim == 0
        and all(type(operation) is Concatenate and operation.dim > 0 for operation in others)
    )
