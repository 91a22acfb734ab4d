"""What the benchmarks share: processes of their own, peak memory, and FLOPs of grouped products."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_a_fresh_process(module: str, **options: Any) -> Any:
    """Run `python -m module` with these options and return what its last line of output says, as JSON."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that torch held during `work` over what it held before, on the CUDA device if there is one.

    On CPU it is [`allocated_peak`]: resident memory has the gaps that malloc leaves between blocks as well.
    """
    if torch.cuda.is_available():
        return _cuda_peak_of(work)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return allocated_peak(profiler)


def resident_peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that this process held during `work` over what it held before, on the CUDA device if there is one.

    Resident memory, with the pages of mapped files that were read. Linux's high-water mark can be set back (`man 5
    proc`, `clear_refs`).
    """
    if torch.cuda.is_available():
        return _cuda_peak_of(work)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _cuda_peak_of(work: Callable[[], Any]) -> int:
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _resident(name: str) -> int:
    """A line of `/proc/self/status`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def allocated_peak(profiler: torch.profiler.profile) -> int:
    """The highest running sum of what was allocated and freed on CPU, in bytes: exact, and the same each time."""
    return max(itertools.accumulate(_changes(profiler), initial=0))


def held_at_end(profiler: torch.profiler.profile) -> int:
    """What was allocated and not freed, in bytes."""
    return sum(_changes(profiler))


def _changes(profiler: torch.profiler.profile) -> list[int]:
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def grouped_mm_flops() -> dict[Any, Callable[..., int]]:
    """How many FLOPs a grouped product has, which torch's counter (2.13) does not know."""

    def count(a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        # Rows by groups times stack, or the gradient of a stack: each row meets one matrix.
        rows, inner = a_shape[-2], a_shape[-1]
        return 2 * rows * inner * b_shape[-1]

    return {torch.ops.aten._grouped_mm: count}
