"""Two places on a device for packed experts that are in RAM: one layer is computed while the next is copied.

A layer is opened whenever its experts run: in forward, when checkpointing runs the layer again, and in backward. What
is opened next is what was opened next the last time that the same two layers came one after the other. So the ring
needs to know nothing of the model, and serves forward and backward passes, generation and evaluation alike; in a first
pass, and where it guesses wrong, the layer that is opened is copied then. In training with checkpointing, L layers take
2L - 4 copies a step: the last two of a forward are the first two of the backward.

Copies are made in a stream of their own. It first waits for what has read the place, and whoever reads a place waits
for its copy. On CPU the streams are torch's empty ones, so that the same lines run there.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..errors import OrdMoERuntimeError


# Bytes to whose multiples each tensor in a place is moved up; what a CUDA allocation is aligned to.
ALIGNMENT = 256


class Stack(Protocol):
    """A packed stack in RAM: an [`~ordmoe_peft.quantization.offloaded.OffloadedParams4bit`]."""

    on_device: torch.Tensor | None

    def version(self) -> tuple[int, ...]:
        """What changes where it is written to."""

    def in_ram(self) -> list[torch.Tensor]:
        """The tensors that are to be copied."""

    def with_copies(self, copies: list[torch.Tensor]) -> torch.Tensor:
        """The stack as it is read from copies of these tensors."""


class Place:
    """Memory on the device for one layer.

    Attributes:
        memory (`torch.Tensor`, *optional*): bytes, as many as the largest layer needed that was here.
        stacks (`list`): weak references to the stacks that are here, with their versions; none while they are copied.
        copies (`list` of `torch.Tensor`): what reads them from here.
        ready: the event after the copy; `None` on CPU.
    """

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.stacks: list[tuple[weakref.ref, tuple[int, ...]]] = []
        self.copies: list[torch.Tensor] = []
        self.ready: Any = None

    def holds(self, stacks: Sequence[Stack]) -> bool:
        """Whether these stacks, and no others, are here as they are now."""
        here = [(id(stack()), version) for stack, version in self.stacks]
        return here == [(id(stack), stack.version()) for stack in stacks]

    def fill(self, stacks: Sequence[Stack], device: torch.device) -> None:
        """Start to copy `stacks` here, in the current stream."""
        self.stacks, self.copies = [], []
        size, start = sum(aligned(tensor.nbytes) for stack in stacks for tensor in stack.in_ram()), 0
        if self.memory is None or len(self.memory) < size:
            self.memory = None  # freed before there is another
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        for stack in stacks:
            copies = []
            for tensor in stack.in_ram():
                part = self.memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copies.append(part.copy_(tensor, non_blocking=True))
                start += aligned(tensor.nbytes)
            self.copies.append(stack.with_copies(copies))
        self.stacks = [(weakref.ref(stack), stack.version()) for stack in stacks]


def aligned(num_bytes: int) -> int:
    """What a tensor of so many bytes takes of a place."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Ring:
    """The places that the layers of one model take turns in.

    It keeps no stack alive. A copy of it, by `copy.deepcopy` or pickle, is an empty one for the copied model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._device: torch.device | None = None
        # The last two layers that were opened, and what came after such two.
        self._last_two: tuple[Any, Any] = (None, None)
        self._next: dict[tuple[Any, Any], tuple[weakref.ref, ...]] = {}

    def __reduce__(self) -> tuple:
        return Ring, ()

    @contextmanager
    def opened(self, stacks: Sequence[Stack], device: torch.device) -> Iterator[None]:
        """Within the block, `on_device` of each of a layer's stacks is the stack on `device`.

        Of two threads, one waits until the other has left the block.
        """
        with self._lock:
            self._set_up(device)
            place = self._open(stacks)
            self._copy_ahead()
            try:
                for stack, copy in zip(stacks, place.copies, strict=True):
                    stack.on_device = copy
                yield
            finally:
                for stack in stacks:
                    stack.on_device = None
                self._stream.wait_stream(self._module.current_stream(device))

    def _set_up(self, device: torch.device) -> None:
        if self._device == device:
            return
        self._module = torch.get_device_module(device)
        if not hasattr(self._module, "Stream") or not hasattr(self._module, "stream"):
            raise OrdMoERuntimeError(
                f"offload_experts=True copies experts to the device beside its work, and {device.type} has no streams "
                "for that. Load the model without it."
            )
        self._stream = self._module.Stream() if device.type == "cpu" else self._module.Stream(device=device)
        self._stream.wait_stream(self._module.current_stream(device))
        self._here, self._other = Place(), Place()
        self._device = device

    def _open(self, stacks: Sequence[Stack]) -> Place:
        """The place where `stacks` are, copied there now if they are in none."""
        if not self._here.holds(stacks):
            self._here, self._other = self._other, self._here
            if not self._here.holds(stacks):
                self._fill(self._here, stacks)
        layer = tuple(map(id, stacks))
        if layer != self._last_two[1]:
            self._next[self._last_two] = tuple(map(weakref.ref, stacks))
            self._last_two = self._last_two[1], layer
        self._module.current_stream(self._device).wait_event(self._here.ready)
        return self._here

    def _copy_ahead(self) -> None:
        expected = self._next.get(self._last_two, ())
        stacks = [stack for reference in expected if (stack := reference()) is not None]
        is_known = 0 < len(stacks) == len(expected)
        if is_known and not self._here.holds(stacks) and not self._other.holds(stacks):
            self._fill(self._other, stacks)

    def _fill(self, place: Place, stacks: Sequence[Stack]) -> None:
        # Not as tensors of inference, which no training could write to later.
        with self._module.stream(self._stream), torch.inference_mode(False), torch.no_grad():
            place.fill(stacks, self._device)
            place.ready = self._stream.record_event()
