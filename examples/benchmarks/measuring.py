"""What the benchmarks share: times by turns, processes of their own, peak memory, and FLOPs of grouped products."""

import gc
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ordmoe_peft.cli.cpu_speed import describe_cpu


# What takes turns in one process shares oneDNN's cache of compiled products. It holds 1,024, and a model of 128 experts
# meets several hundred shapes in 16 bits: without room for all, each would compile anew what another's turn pushed out.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

# Calls in a context, of which the median counts: entering it fills the caches with other things, for which the first
# pay.
CALLS_INSIDE = 7


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __add__(self, other: "Times") -> "Times":
        return Times([mine + its for mine, its in zip(self.seconds, other.seconds, strict=True)])

    def over(self, other: "Times") -> float:
        """The median ratio to what `other` took in the same turn: a machine's speed drifts from turn to turn."""
        return statistics.median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.median < 0.1 else (1, "s")
        digits = 2 if self.median * scale < 10 else 1 if scale > 1 else 3
        low, middle, high = (f"{scale * x:.{digits}f}" for x in (min(self.seconds), self.median, max(self.seconds)))
        return f"{middle} [{low}, {high}] {unit}"


def by_turns(
    functions: dict[str, Callable[[], Any]],
    repetitions: int,
    device: str = "cpu",
    inside: dict[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, Times]:
    """Run each function once to warm up, then all of them one after the other, `repetitions` times, each turn begun by
    another.

    A function that `inside` names runs in that context, [`CALLS_INSIDE`] times, and the median counts; entering and
    leaving it is not timed.
    """
    seconds, names = {name: [] for name in functions}, list(functions)
    calls = 1 if inside is None else CALLS_INSIDE
    for repetition in range(repetitions + 1):
        names = names[1:] + names[:1]
        for name in names:
            with (inside or {}).get(name, nullcontext)():
                turn = [_seconds(functions[name], device) for _ in range(calls)]
            if repetition:
                seconds[name].append(statistics.median(turn))
    return {name: Times(values) for name, values in seconds.items()}


def _seconds(function: Callable[[], Any], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns, run in a fork of this process: nothing that it allocates stays.

    Nothing must have started CUDA or threads before; else take [`in_a_fresh_process`].
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def print_cpu() -> None:
    """The CPU's capability, to stand beside the figures; in a process of its own, so that no threads start here."""
    print(in_own_process(describe_cpu))


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
        gc.collect()
        return _cuda_peak_of(work)
    return allocated_peak(profiled(work)[1])


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


def private_peak_of(work: Callable[[], Any]) -> int:
    """As [`resident_peak_of`], without the pages of mapped files, which the kernel takes back when it needs room.

    Looked at every millisecond: Linux has no high-water mark of it.
    """
    if torch.cuda.is_available():
        return _cuda_peak_of(work)
    before, seen, done = _resident("RssAnon"), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(_resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return max([*seen, _resident("RssAnon")]) - before


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


def profiled(work: Callable[[], Any]) -> tuple[Any, torch.profiler.profile]:
    """What `work()` returns, and what was allocated and freed on CPU meanwhile."""
    # The collector would free what earlier work left, and that would count as memory that `work` freed.
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    return result, profiler


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
