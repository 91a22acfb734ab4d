"""Run a model without its numbers and see how much memory it would hold at each moment.

Floating-point tensors are fake: they have a shape, a dtype and a device, and no data. Integers are real, so whatever
decides shapes (positions, image grids, which rows an expert gets) is computed as always. A router's choice would need
numbers, so it is made up: tokens are shared out evenly over the experts.

The model's own code runs, with autograd and checkpointing, so the result follows every change to it. What kernels
allocate inside themselves is not seen.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..._compat import (
    GROUPED_MM,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    storage_id,
    tree_leaves,
    tree_map,
    unset_fake_temporarily,
)


aten = torch.ops.aten
CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable)
DEVICE = torch.device("cpu")


def fake_of(tensor: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    """A fake tensor on the storage of a meta tensor."""
    with unset_fake_temporarily():  # within the mode, `detach` would make a fake meta tensor with another storage
        return FakeTensor(mode, tensor.detach(), DEVICE)


class MemoryTrace(TorchDispatchMode):
    """Within the block, counts the bytes of tensors that operations make, as long as each lives.

    Args:
        fakes ([`FakeTensorMode`]): the mode that fake tensors belong to; entered before this one.
        at_hand (iterable of `torch.Tensor`): tensors that are not counted, such as weights.

    Attributes:
        live (`int`), peak (`int`): bytes held now, and the most so far.
    """

    def __init__(self, fakes: FakeTensorMode, at_hand: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.fakes, self.live, self.peak = fakes, 0, 0
        self._counted = {storage_id(tensor.untyped_storage()): 0 for tensor in at_hand}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = self._run(func, args, kwargs or {})
        for tensor in _tensors(output):
            self._count(tensor.untyped_storage())
        return output

    def _run(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = _tensors((args, kwargs))
        if tensors and not any(map(_is_fake, tensors)):
            return _really(func, args, kwargs)
        if func is aten.index.Tensor:
            args = (args[0], _without_masks(args[1]))
        if any(map(_is_meta, tensors)):
            args, kwargs = tree_map(lambda leaf: fake_of(leaf, self.fakes) if _is_meta(leaf) else leaf, (args, kwargs))
        if func is GROUPED_MM:
            return _grouped_product(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in CHOICES:
            return output[0], _really(_even_choice, (output[1].shape, tensors[0].shape[-1]))
        if not tensors and isinstance(output, FakeTensor) and not output.is_floating_point():
            return _really(func, args, kwargs)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage_id(storage)
        if key in self._counted:
            return
        self._counted[key] = storage.nbytes()
        self.live += self._counted[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._counted.pop(key)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_meta(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) and leaf.device.type == "meta"


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def _really(func: Callable, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
    with unset_fake_temporarily():
        return func(*args, **(kwargs or {}))


def _without_masks(indices: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with masks spelled out: nobody knows how many entries of a fake mask are true."""
    spelled: list[torch.Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not _is_fake(index)
        spelled += _really(torch.nonzero, (index,)).unbind(1) if is_mask else [index]
    return spelled


def _grouped_product(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """What `grouped_mm` returns. Its own rule for fake tensors takes bf16 alone, the operator all dtypes."""
    groups = [] if right.dim() == 3 else [len(offs)]  # rows by stack, or the gradient of a stack
    return left.new_empty(*groups, left.shape[0], right.shape[-1])


def _even_choice(shape: torch.Size, num_choices: int) -> torch.Tensor:
    """Indices of that shape which take each of the choices equally often, and none twice in a row of them."""
    return (torch.arange(shape.numel()) % num_choices).view(shape)
