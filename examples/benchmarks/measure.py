"""Time by turns, and peak memory of a process of its own."""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.median < 0.1 else (1, "s")
        digits = 2 if self.median * scale < 10 else 1 if scale > 1 else 3
        low, middle, high = (f"{scale * x:.{digits}f}" for x in (min(self.seconds), self.median, max(self.seconds)))
        return f"{middle} [{low}, {high}] {unit}"


def by_turns(functions: dict[str, Callable[[], Any]], repetitions: int, device: str = "cpu") -> dict[str, Times]:
    """Run each function once to warm up, then all of them one after the other, `repetitions` times."""
    seconds = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(values) for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns, run in a fork of this process: nothing that it allocates stays."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def added_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that three calls of `function` add at most to what is held. On CPU: resident, and Linux only."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # lowers the peak to what is resident now
        before = _resident("VmRSS")
    for _ in range(3):
        function()
    return (torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")) - before


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
