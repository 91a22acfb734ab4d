"""Memory of tier passes: what one takes, what is free, and so how many tokens may run under all tiers at once."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


# A batch at once may take this share of what is free: the peak is measured on one batch, others are composed otherwise.
SHARE_OF_FREE = 0.5


@dataclass
class PassMemory:
    """Filled in by [`measured_passes`].

    Args:
        peak (`int`): most bytes taken over what was in use before; 0 where it cannot be measured.
        free (`int`): bytes that were free before.
    """

    peak: int = 0
    free: int = 0

    def max_tokens(self, tokens: int, num_passes: int) -> int:
        """Most tokens of a batch that may run at once, where `tokens` were measured tier by tier.

        0 where the peak is not known.
        """
        return int(tokens * SHARE_OF_FREE * self.free / (self.peak * num_passes)) if self.peak else 0


@contextmanager
def measured_passes(device: torch.device) -> Iterator[PassMemory]:
    """Measure the peak memory of what runs in the block, on CUDA devices and, on Linux, on the CPU.

    The peak that `torch.cuda` or the kernel kept for this process before is lost.
    """
    meter = _CudaMeter(device) if device.type == "cuda" else _ProcessMeter() if _can_reset(device) else None
    if meter is None:
        yield PassMemory()
        return
    memory, before = PassMemory(free=meter.free()), meter.restart()
    yield memory
    memory.peak = max(meter.peak() - before, 1)


class _CudaMeter:
    def __init__(self, device: torch.device):
        self.device = device

    def free(self) -> int:
        # What the allocator holds unused is free as well.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

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
