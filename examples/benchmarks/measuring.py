"""What the benchmarks share: processes of their own, peak memory, and FLOPs of grouped products."""

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
    """The most bytes that `work` held over what was held before: on the CUDA device if there is one, else resident.

    The resident peak is Linux's high-water mark, which can be set back (`man 5 proc`, `clear_refs`).
    """
    if torch.cuda.is_available():
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """A line of `/proc/self/status`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def grouped_mm_flops() -> dict[Any, Callable[..., int]]:
    """How many FLOPs a grouped product has, which torch's counter (2.13) does not know."""

    def count(a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        # Rows by groups times stack, or the gradient of a stack: each row meets one matrix.
        rows, inner = a_shape[-2], a_shape[-1]
        return 2 * rows * inner * b_shape[-1]

    return {torch.ops.aten._grouped_mm: count}
