"""Memory of tier passes: what one takes, what is free, and so how many tokens may run under all tiers at once."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..experts.tuning import free_on_cuda
from .optimizer_states import local


# A batch at once may take this share of the room that is left: the peak is measured on one batch, others are composed
# otherwise, and an allocator cannot use every gap.
SHARE_OF_ROOM = 0.8


@dataclass
class PassMemory:
    """What tier passes took, one after another.

    What the optimizer takes for the time of its step is in neither: no activations are held then.

    Args:
        peak (`int`): most bytes that a pass took, without gradients of weights; 0 where it cannot be measured.
        free (`int`): bytes that were free before.
        to_come (`int`): how many of these are for gradients and optimizer states that did not exist yet.
    """

    peak: int = 0
    free: int = 0
    to_come: int = 0

    def max_tokens(self, tokens: int, num_passes: int) -> int:
        """Most tokens of a batch that may run at once, where `tokens` were measured tier by tier.

        0 where the peak is not known.
        """
        room = SHARE_OF_ROOM * max(self.free - self.to_come, 0)
        return int(tokens * room / (self.peak * num_passes)) if self.peak else 0


class Meter(Protocol):
    """Measures what this process takes of a device's memory, in bytes."""

    def free(self) -> int:
        """What is free on the device."""

    def restart(self) -> int:
        """What is in use. The peak is counted from here on."""

    def peak(self) -> int:
        """Most that was in use since."""


def meter_of(device: torch.device) -> Meter | None:
    """The meter of a CUDA device or, on Linux, of the CPU; there is none of others.

    The peak that `torch.cuda` or the kernel kept for this process before is lost when it is restarted.
    """
    return _CudaMeter(device) if device.type == "cuda" else _ProcessMeter() if _can_reset(device) else None


@contextmanager
def measured_passes(meter: Meter, parameters: Iterable[torch.Tensor], missing_states: int) -> Iterator[PassMemory]:
    """Measure the peak memory of the passes that run in the block. Filled in when it ends.

    Args:
        meter ([`Meter`]): of the device that they run on.
        parameters (iterable of `torch.Tensor`): what is trained.
        missing_states (`int`): bytes of optimizer states that do not exist yet.
    """
    memory = PassMemory(free=meter.free())
    # The room of each gradient that does not exist yet is held until it does, so that it does not count as the pass's.
    held = {parameter: torch.ones_like(local(parameter)) for parameter in parameters if parameter.grad is None}
    memory.to_come = missing_states + sum(room.nbytes for room in held.values())

    def release(parameter: torch.Tensor) -> None:
        held.pop(parameter, None)

    handles = [parameter.register_post_accumulate_grad_hook(release) for parameter in held]
    before = meter.restart()
    try:
        yield memory
        memory.peak = max(meter.peak() - before, 1)
    finally:
        for handle in handles:
            handle.remove()


class _CudaMeter:
    def __init__(self, device: torch.device):
        self.device = device

    def free(self) -> int:
        return free_on_cuda(self.device)

    def restart(self) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class _ProcessMeter:
    """This process's resident memory, by Linux's proc(5)."""

    def free(self) -> int:
        return int(min(_proc_bytes("meminfo", "MemAvailable"), _free_in_container()))

    def restart(self) -> int:
        Path("/proc/self/clear_refs").write_text("5")
        return _proc_bytes("self/status", "VmRSS")

    def peak(self) -> int:
        return _proc_bytes("self/status", "VmHWM")


def _can_reset(device: torch.device) -> bool:
    return device.type == "cpu" and os.access("/proc/self/clear_refs", os.W_OK)


def _proc_bytes(file: str, name: str) -> int:
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _free_in_container() -> float:
    """What the control group of a container leaves; infinite without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder.joinpath(name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return math.inf
    return math.inf if limit == "max" else max(int(limit) - int(used), 0)
