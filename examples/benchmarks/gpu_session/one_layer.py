"""Sections b and c: the experts of one MoE layer in NF4 with LoRA, timed and counted, and with other sizes of work."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ordmoe_peft.experts.forward import frozen_step, grouped_forward
from ordmoe_peft.experts.frozen import run_frozen_experts
from ordmoe_peft.experts.tuning import MIB, ON_CPU, WorkSizes, on_gpu, work_sizes

from ..layers import Layer, random_experts, random_lora, routing, updates
from ..measuring import by_turns, peak_of
from .rows import MEASURED, Row, Size, tried, verdict


NF4_DOUBLE = {"quant_type": "nf4", "use_double_quant": True}
SKEWS = {"even": 0.0, "Zipf 1": 1.0}
# Calls of CUDA's interface in which the host waits for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
FORWARD, BACKWARD = "forward", "backward"


class LayerStep:
    """A layer's experts with tokens for them.

    Args:
        layer ([`~examples.benchmarks.layers.Layer`]), experts (`nn.Module`): what runs.
        sizes ([`~ordmoe_peft.experts.tuning.WorkSizes`], *optional*): how; through `grouped_mm` without.
    """

    def __init__(self, layer: Layer, experts: nn.Module, sizes: WorkSizes | None):
        device, dtype = experts.down_proj.device, torch.bfloat16
        dtype = experts.down_proj.dtype if experts.down_proj.is_floating_point() else dtype
        generator = torch.Generator(device).manual_seed(2)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)

        self.experts, self.sizes, self.index_TK = experts, sizes, routing(layer).to(device)
        self.factors = random_lora(layer, dtype, str(device))
        self.lora = updates(layer, self.factors)
        self.x_TH, self.grad_TH = (
            normal(layer.tokens, layer.hidden).requires_grad_(),
            normal(layer.tokens, layer.hidden),
        )
        self.weights_TK = normal(layer.tokens, layer.top_k).softmax(-1).detach().requires_grad_()

    def forward(self) -> torch.Tensor:
        if self.sizes is None:
            return grouped_forward(self.experts, self.x_TH, self.index_TK, self.weights_TK, self.lora)
        step = frozen_step(self.experts, self.index_TK, self.lora, self.sizes)
        return run_frozen_experts(self.x_TH, self.weights_TK, *step)

    def backward(self, y_TH: torch.Tensor) -> None:
        y_TH.backward(self.grad_TH)

    def both(self) -> None:
        for leaf in (self.x_TH, self.weights_TK, *(factor for pair in self.factors.values() for factor in pair)):
            leaf.grad = None
        self.backward(self.forward())


@dataclass(frozen=True)
class Calls:
    """What the host asked the device for, and how long the device worked, in milliseconds."""

    launches: int
    waits: int
    copies_down: int
    milliseconds: float


def time_layer(size: Size, device: str) -> Iterator[Row]:
    """Section b."""
    experts, sizes = random_experts(size.layer, torch.bfloat16, device, NF4_DOUBLE), work_sizes(torch.device(device))
    for tokens, (name, skew) in itertools.product(size.tokens, SKEWS.items()):
        step = LayerStep(replace(size.layer, tokens=tokens, skew=skew), experts, sizes)
        runs = {FORWARD: (lambda: None, lambda _, step=step: step.forward()), BACKWARD: (step.forward, step.backward)}
        for part, (prepare, work) in runs.items():
            times = timed(prepare, work, size.repetitions, device)
            yield described(f"{part}, {tokens:,} tokens, {name}", part, times, calls_of(prepare, work, device))


def described(case: str, part: str, times: dict[str, float], calls: Calls) -> Row:
    most = 1 if part == FORWARD else 0
    figure = (
        f"{times['events']:.2f} ms by events, {times['host']:.2f} on the host, {calls.milliseconds:.2f} of kernels; "
        f"launches {calls.launches}, waits {calls.waits}, copies to the host {calls.copies_down}"
    )
    return Row(case, figure, verdict(calls.waits <= most, f"{most} expected"), times | vars(calls))


def timed(prepare: Callable[[], Any], work: Callable[[Any], Any], repetitions: int, device: str) -> dict[str, float]:
    """Medians in milliseconds of `work` on what `prepare` gives: between two events on the device, and until the host
    was done with it. On a CPU both are the same."""
    events, host = [], []
    for repetition in range(repetitions + 2):
        prepared = prepare()
        if device == "cpu":
            began = time.perf_counter()
            work(prepared)
            host.append(1e3 * (time.perf_counter() - began))
            events.append(host[-1])
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began = time.perf_counter()
            start.record()
            work(prepared)
            end.record()
            host.append(1e3 * (time.perf_counter() - began))
            torch.cuda.synchronize()
            events.append(start.elapsed_time(end))
        if repetition < 2:  # the first compile and load kernels
            events.clear(), host.clear()
    return {"events": statistics.median(events), "host": statistics.median(host)}


def calls_of(prepare: Callable[[], Any], work: Callable[[Any], Any], device: str) -> Calls:
    """What `work` takes on what `prepare` gives, over a profile of nothing: the profiler waits for the device, too."""
    of_nothing, of_work = profiled(lambda: None, device), profiled(partial(work, prepare()), device)
    both = zip(vars(of_work).values(), vars(of_nothing).values(), strict=True)
    return Calls(*(mine - base for mine, base in both))


def profiled(work: Callable[[], Any], device: str) -> Calls:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    if device == "cuda":
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        work()
    rows = profiler.key_averages()
    return Calls(
        launches=sum(row.count for row in rows if "LaunchKernel" in row.key),
        waits=sum(row.count for row in rows if row.key in WAITS),
        copies_down=sum(row.count for row in rows if row.key.startswith("Memcpy DtoH")),
        milliseconds=sum(row.self_device_time_total for row in rows if row.device_type == DeviceType.CUDA) / 1e3,
    )


# ------------------------------------------------------------------------------------------------------------ section c
def compare_sizes(size: Size, device: str) -> Iterator[Row]:
    """Section c: a layer's forward and backward with more or less of its experts at a time, packed and dense."""
    dense = {dtype: partial(random_experts, size.layer, dtype, device) for dtype in (torch.bfloat16, torch.float16)}
    packed = partial(random_experts, size.layer, torch.bfloat16, device, NF4_DOUBLE)
    ways = {f"{mib} MiB at a time": (packed, on_gpu(mib)) for mib in (64, 128, 256)}
    ways |= {
        f"bins that cost {mib} MiB, 128 at a time": (packed, replace(on_gpu(), bin_cost=mib * MIB)) for mib in (1, 16)
    }
    ways |= {
        "expert by expert": (packed, ON_CPU),
        "dense, 128 MiB at a time": (dense[torch.bfloat16], on_gpu()),
        "dense, grouped_mm, bf16": (dense[torch.bfloat16], None),
        "dense, grouped_mm, fp16, as consumer cards run it": (dense[torch.float16], None),
    }
    made: dict[int, nn.Module] = {}
    for name, (make, sizes) in ways.items():
        if id(make) not in made:
            made.clear()  # one stack at a time
            made[id(make)] = make()
        for routed, skew in SKEWS.items() if size.is_thorough else [("Zipf 1", 1.0)]:
            case = f"{name}, {routed}"
            layer = replace(size.layer, tokens=size.tokens[len(size.tokens) // 2], skew=skew)
            yield tried(case, partial(measure, case, layer, made[id(make)], sizes, size, device))


def measure(case: str, layer: Layer, experts: nn.Module, sizes: WorkSizes | None, size: Size, device: str) -> Row:
    step = LayerStep(layer, experts, sizes)
    times = by_turns({case: step.both}, size.repetitions, device)[case]
    peak = peak_of(step.both)
    figure = f"forward and backward {times}, peak {peak / MIB:.0f} MiB"
    return Row(case, figure, MEASURED, {"seconds": times.median, "peak": peak})
