"""Packed expert stacks that stay in RAM, and are copied to the device when their layer runs.

Bytes and block scales stay where they are whatever moves the model. The small tensors of a stack, such as code tables,
go along, so the device that they are on is where the model runs. To everything that does not run experts (`state_dict`,
`save_pretrained`, merging, a census) a stack in RAM is a packed parameter on the CPU.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit

from .._compat import version_of
from ..errors import OrdMoEModelError
from .ring import Ring


class OffloadedParams4bit(Params4bit):
    """A packed stack in RAM; [`offload`] makes it.

    Attributes:
        ring ([`~ordmoe_peft.quantization.ring.Ring`]): what brings it to the device; one for all stacks of a model.
        on_device (`torch.Tensor`, *optional*): the stack on the device, while its layer is opened.
    """

    ring: Ring
    on_device: torch.Tensor | None

    def version(self) -> tuple[int, ...]:
        """What changes where bytes or scales do. Writes in place through `.data` are not seen: torch counts none."""
        absmax = self.quant_state.absmax
        return self.data_ptr(), version_of(self), absmax.data_ptr(), version_of(absmax)

    def in_ram(self) -> list[torch.Tensor]:
        """Bytes and block scales."""
        return [self.data, self.quant_state.absmax]

    def with_copies(self, copies: list[torch.Tensor]) -> torch.Tensor:
        """Copied bytes as a packed weight, with copied scales."""
        packed_bytes, absmax = copies
        packed_bytes.quant_state = _with_small_tensors_on(absmax.device, copy.copy(self.quant_state))
        packed_bytes.quant_state.absmax = absmax
        packed_bytes.quant_storage = self.quant_storage
        return packed_bytes

    def to(self, *args: Any, **kwargs: Any) -> "OffloadedParams4bit":
        """Itself. The small tensors go to the device that is asked for; a dtype is passed over."""
        _with_small_tensors_on(self.quant_state.code.to(*args, **kwargs).device, self.quant_state)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.ring, self.on_device = state["ring"], None

    def __deepcopy__(self, memo: dict) -> "OffloadedParams4bit":
        copied = super().__deepcopy__(memo)  # in memory that is not pinned
        return offload(copied, copy.deepcopy(self.ring, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        resident = Params4bit(self.data, **_settings(self))
        return offload, (resident, self.ring)


# PEFT, accelerate and TRL know packed parameters by the name of their class: they count and cast others.
OffloadedParams4bit.__name__ = Params4bit.__name__


def offload(packed: Params4bit, ring: Ring) -> OffloadedParams4bit:
    """`packed` with its bytes and scales in RAM, which is pinned where CUDA exists.

    torch rounds the size of a pinned tensor up to a power of two, which is a third more at 30B-A3B, unless the variable
    `PYTORCH_ALLOC_CONF` has `pinned_max_round_threshold_mb:1`.

    Raises:
        [`OrdMoEModelError`]: so much memory cannot be pinned.
    """
    packed.quant_state.absmax = _in_ram(packed.quant_state.absmax)
    offloaded = OffloadedParams4bit(_in_ram(packed.data), **_settings(packed))
    offloaded.ring, offloaded.on_device = ring, None
    return offloaded


def is_in_ram(weight: torch.Tensor) -> bool:
    """Whether `weight` is a packed stack that stays in RAM."""
    return isinstance(weight, OffloadedParams4bit)


def at_hand(weight: torch.Tensor) -> torch.Tensor:
    """What to read `weight` from: the stack on the device while its layer is opened, else the weight itself."""
    on_device = getattr(weight, "on_device", None)
    return weight if on_device is None else on_device


def opener(weights: Iterable[torch.Tensor], device: torch.device) -> Callable[[], AbstractContextManager]:
    """A function to a context, within which those of a layer's `weights` that are in RAM are on `device`, too."""
    stacks = [weight for weight in weights if isinstance(weight, OffloadedParams4bit)]
    return partial(stacks[0].ring.opened, stacks, device) if stacks else nullcontext


def device_of_use(weight: torch.Tensor) -> torch.device:
    """Where `weight` is computed with; for a stack in RAM that is where its small tensors are."""
    return weight.quant_state.code.device if isinstance(weight, OffloadedParams4bit) else weight.device


def _settings(packed: Params4bit) -> dict[str, Any]:
    names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")
    return {"requires_grad": False} | {name: getattr(packed, name) for name in names}


def _with_small_tensors_on(device: torch.device, state: QuantState) -> QuantState:
    """`state`, whose tensors besides the block scales are on `device` now."""
    state.code = state.code.to(device)
    if state.nested:
        state.offset, state.state2 = state.offset.to(device), copy.copy(state.state2)
        state.state2.absmax, state.state2.code = state.state2.absmax.to(device), state.state2.code.to(device)
    return state


def _in_ram(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta or not torch.cuda.is_available():
        return tensor if tensor.is_meta else tensor.cpu()
    try:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise OrdMoEModelError(
            f"offload_experts=True: {tensor.nbytes / 2**30:.2f} GiB of RAM cannot be pinned ({error}). All packed "
            "experts must fit into free RAM, and torch rounds each stack's up to a power of two, unless the variable "
            "PYTORCH_ALLOC_CONF has pinned_max_round_threshold_mb:1."
        ) from error
    return pinned.copy_(tensor)
