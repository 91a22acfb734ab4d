"""Fused stacks packed expert by expert while they are read, so that loading never holds one of them whole.

Two thirds of the families keep one tensor per expert and projection on disk, and transformers' converters first stack
all of them, then concatenate gate and up: twice the stack at once. The operations here run the same converter for one
expert at a time.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist


Convert = Callable[[dict[str, Any]], dict[str, Any]]
Release = Callable[[list[torch.Tensor]], None]


class PackWhileMerging(ConversionOps):
    """Merges per-expert tensors into a fused stack; a stack that is to be packed is, one expert at a time.

    Args:
        operations (`list[ConversionOps]`): the converter's own.
        pack (`Callable`): a sized iterable of matrices and the stack's name → the packed stack.
        is_stack (`Callable`): whether the parameter of a name is a stack to pack.
        release (`Callable`): told which tensors, as they were read, are done with.
    """

    def __init__(
        self, operations: list[ConversionOps], pack: Callable, is_stack: Callable[[str], bool], release: Release
    ):
        self.operations, self.pack, self.is_stack, self.release = operations, pack, is_stack, release

    def __deepcopy__(self, memo: dict) -> "PackWhileMerging":
        """Itself: transformers copies the converter for each tensor on disk, and this one refers to the quantizer."""
        return self

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, Any]:
        merge = functools.partial(self._merge, full_layer_name=full_layer_name, **kwargs)
        if not self.is_stack(full_layer_name):
            return merge(input_dict)
        packed = self.pack(MergedExperts(input_dict, merge, self.release), full_layer_name)
        return {kwargs["target_patterns"][0]: packed}

    def _merge(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        for operation in self.operations:
            input_dict = operation.convert(input_dict, **kwargs)
        return input_dict


class MergedExperts:
    """The matrices of a stack, each made of its expert's tensors when its turn comes, after which those are let go.

    Args:
        tensors (`dict[str, list[torch.Tensor]]`): source pattern → one tensor per expert; emptied.
        merge (`Callable`): the same with one tensor in each list → a stack of one expert.
        release (`Callable`): told which tensors are done with.
    """

    def __init__(self, tensors: dict[str, list[torch.Tensor]], merge: Convert, release: Release):
        self.tensors, self.merge, self.release = tensors, merge, release
        self.num_experts = min(len(per_expert) for per_expert in tensors.values())

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.num_experts):
            of_expert = {pattern: [per_expert.pop(0)] for pattern, per_expert in self.tensors.items()}
            read = [tensor for tensors in of_expert.values() for tensor in tensors]
            (stack_1OI,) = self.merge(of_expert).values()
            yield stack_1OI[0]
            self.release(read)


def packs_by_expert(operations: list[ConversionOps]) -> bool:
    """Whether `operations` stack experts in the first dimension and treat each by itself after that."""
    first, *others = operations
    return (
        type(first) is MergeModulelist
        and first.dim == 0
        and all(type(operation) is Concatenate and operation.dim > 0 for operation in others)
    )
