"""Packed experts outside transformers' experts interface: dense for the forward that reads them.

Their own class's forward alone knows how to run such experts, and it reads numbers. It is run on a copy of its module
that holds dense stacks and is dropped afterwards; the module itself never changes. So there is nothing to put back when
a forward fails, nested and repeated calls and threads do not meet, and a dense weight that
`torch.func.functional_call` has put in the place of a packed one is read as it is. Plain attributes that a forward
assigns to the module that reads the stacks are its own afterwards, as a loss that it keeps.

A layer's dense stacks live as long as its forward. Where backward needs them, autograd saves what they are unpacked
from, and an expert that was read by itself is unpacked by itself then.
"""

import copy
import types
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import logging

from .._compat import own_forward_name, saved_tensors_hooks_in_use, storage_id, tree_leaves
from ..errors import OrdMoEModelError
from ..moe_model import is_fused_experts
from .offloaded import at_hand, opener
from .storage import dense_stack, is_packed, logical_shape


logger = logging.get_logger(__name__)


class UnpackedForward:
    """The forward of a module that reads packed stacks, its own or those of modules in it.

    The stacks are unpacked to autocast's dtype, if that is on, else to that of the first floating-point tensor among
    its inputs. Linear layers in 4 bits and experts of transformers' interface read packed weights as they are.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def __wrapped__(self) -> Callable:
        """What stands for its arguments (`inspect.signature`)."""
        return types.MethodType(type(self.module).forward, self.module)

    @torch.compiler.disable(reason="OrdMoE unpacks experts for each call")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        dtype = _dtype_of_products(next(tensor for tensor in inputs if tensor.is_floating_point()))
        stacks: dict[int, DenseStack] = {}
        module = _with_dense_stacks(self.module, dtype, stacks)
        try:
            with _packed_for_backward(stacks) if stacks and torch.is_grad_enabled() else nullcontext():
                return type(module).forward(module, *args, **kwargs)
        finally:
            stacks.clear()  # which autograd keeps with its hooks
            _keep_attributes(self.module, module)


def _dtype_of_products(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _keep_attributes(module: nn.Module, copied: nn.Module) -> None:
    """Give `module` what the forward has assigned to its copy, as a loss of its own."""
    own = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_children())}
    for name, value in vars(copied).items():
        if name not in own and vars(module).get(name) is not value:
            vars(module)[name] = value


@dataclass(frozen=True)
class DenseStack:
    """A packed stack, and the dense one that a forward reads."""

    packed: Params4bit
    dense: torch.Tensor


@dataclass(frozen=True)
class PackedView:
    """A view of a dense stack, by what it is unpacked from."""

    packed: Params4bit
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    def unpack(self) -> torch.Tensor:
        of_expert = logical_shape(self.packed)[1:].numel()
        end = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        first = self.offset // of_expert
        dense = unpacked_stack(self.packed, self.dtype, slice(first, end // of_expert + 1))
        return dense.as_strided(self.shape, self.strides, self.offset - first * of_expert)


def unpacked_stack(packed: Params4bit, dtype: torch.dtype, experts: slice = slice(None)) -> torch.Tensor:
    """[`dense_stack`] where the model runs, also of a stack that stays in RAM."""
    with opener([packed], packed.quant_state.code.device)():
        return dense_stack(at_hand(packed), dtype, experts)


def _with_dense_stacks(module: nn.Module, dtype: torch.dtype, stacks: dict[int, DenseStack]) -> nn.Module:
    """A copy of `module` whose packed stacks are dense; they are added to `stacks`, by their storage."""
    copied = copy.copy(module)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if is_packed(parameter):
            dense = unpacked_stack(parameter, dtype)
            stacks[storage_id(dense.untyped_storage())] = DenseStack(parameter, dense)
            vars(copied)[name] = dense  # found before the module's parameters are
    for name, child in module.named_children():
        reads_packed = isinstance(child, Linear4bit) or is_fused_experts(child)
        if not reads_packed and any(map(is_packed, child.parameters())):
            vars(copied)[name] = _with_dense_stacks(child, dtype, stacks)
    return copied


def _packed_for_backward(stacks: dict[int, DenseStack]) -> saved_tensors_hooks:
    """Within the context, autograd saves views of dense stacks as packed ones, and all else as outside of it."""
    pack_outside, unpack_outside = saved_tensors_hooks_in_use() or (torch.Tensor.detach, lambda saved: saved)

    def pack(tensor: torch.Tensor) -> Any:
        stack = stacks.get(storage_id(tensor.untyped_storage()))
        if stack is None or tensor.dtype != stack.dense.dtype or not tensor.numel():
            return pack_outside(tensor)
        return PackedView(stack.packed, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(saved: Any) -> torch.Tensor:
        return saved.unpack() if isinstance(saved, PackedView) else unpack_outside(saved)

    return saved_tensors_hooks(pack, unpack)


def check_own_forward(name: str, module: nn.Module) -> None:
    """Raise [`OrdMoEModelError`] if something has replaced the forward of a module that is to read packed stacks."""
    if own_forward_name(module) == "forward" and "forward" in vars(module):
        raise OrdMoEModelError(
            f"The forward of {name} ({type(module).__name__}) was replaced, so its experts cannot be packed in 4 bits: "
            "its class's own forward is what reads them. Take the replacement off, or name the module in "
            "`llm_int8_skip_modules`."
        )


def unpack_in_forward_(model: nn.Module, readers: Iterable[str]) -> None:
    """Have the modules `readers` of `model`, which read packed stacks, read them dense."""
    modules = [model.get_submodule(name) for name in readers]
    for module in modules:
        setattr(module, own_forward_name(module), UnpackedForward(module))
    if modules:
        classes = ", ".join(sorted({type(module).__name__ for module in modules}))
        logger.warning_once(
            f"The experts of {classes} are outside transformers' experts interface. In 4 bits they are slower than "
            "others: each forward unpacks a layer's stacks, backward unpacks them again, and both need memory for them."
        )


def stop_unpacking_(model: nn.Module) -> None:
    """Take off what [`unpack_in_forward_`] put on `model`, whose stacks are dense again."""
    for module in model.modules():
        name = own_forward_name(module)
        if isinstance(vars(module).get(name), UnpackedForward):
            delattr(module, name)
            if name != "forward":  # which accelerate's hook calls
                setattr(module, name, types.MethodType(type(module).forward, module))
