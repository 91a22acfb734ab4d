"""Section a: what is there, and tiny experts on CPU and on the device, values and all gradients.

Both are held against the same numbers in float64 on the CPU, expert by expert. Differences are in units of the dtype's
precision, relative to the largest number of the tensor.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ordmoe_peft.cli.cpu_speed import describe_cpu
from ordmoe_peft.experts.forward import frozen_step, grouped_forward
from ordmoe_peft.experts.frozen import run_frozen_experts
from ordmoe_peft.experts.row_by_row import run_row_by_row
from ordmoe_peft.experts.tuning import ON_CPU, WorkSizes, has_grouped_kernel, on_gpu, work_sizes
from ordmoe_peft.quantization.storage import dense_stack, is_packed, pack_experts

from ..layers import Layer, projections, random_experts, random_lora, updates
from .rows import Row, Size, last_line, tried, verdict


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKINGS = {
    "dense": None,
    "NF4, double": {"quant_type": "nf4", "use_double_quant": True},
    "FP4": {"quant_type": "fp4"},
}
PLAIN = Layer(experts=8, top_k=2, hidden=64, width=32, tokens=40)
LAYOUTS = {
    "gated": PLAIN,
    "transposed and biased": replace(PLAIN, is_transposed=True, has_bias=True),
    "not gated": replace(PLAIN, has_gate=False),
    "with a norm": replace(PLAIN, has_norm=True, has_bias=True),
    # Rows of 40 and 24 weights are no whole blocks, nor is an expert.
    "padded": replace(PLAIN, hidden=40, width=24, has_bias=True),
}
# Each token's two experts of eight.
ROUTINGS = {
    "skewed, absent experts": [[1, e] for e in (0, 2, 3, 7)] + [[1, 0]] * 20 + [[1, 3]] * 9,
    "all on one": [[5]] * 17,
    "one token": [[6, 2]],
    "even": [[i % 8, (i + 3) % 8] for i in range(40)],
    "no token": [],
}
RANK = 5
# What the device may be off by, as often as the CPU is off, and at least in units of the dtype's precision.
TIMES_THE_CPU, UNITS = 4, 8


def check(size: Size, device: str) -> Iterator[Row]:
    yield from describe(device)
    dtypes = DTYPES if size.is_thorough else {"bf16": torch.bfloat16}
    for dtype, packing in itertools.product(dtypes, PACKINGS):
        if PACKINGS[packing] is not None:
            case = f"packed and unpacked, {packing}, {dtype}"
            yield tried(case, partial(compare_packing, case, DTYPES[dtype], PACKINGS[packing], device))
        ways = ["row by row", "blocks of 1", "blocks of 3", "all experts at once"]
        for way in [*ways, "expert by expert", *(["grouped_mm"] if packing == "dense" else [])]:
            case = f"{way}, {packing}, {dtype}"
            yield tried(case, partial(compare, case, way, DTYPES[dtype], packing, size, device))


def describe(device: str) -> Iterator[Row]:
    names = ("transformers", "peft", "trl", "accelerate", "bitsandbytes")
    yield Row("versions", ", ".join([f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in names)]))
    sizes = work_sizes(torch.device(device))
    budget = "one matrix" if sizes.matrices is None else f"{sizes.matrices >> 20} MiB"
    kernel = has_grouped_kernel(torch.device(device), torch.bfloat16)
    chosen = f"{budget} at a time, grouped_mm is {'one kernel' if kernel else 'a loop'} in bf16"
    if device == "cpu":
        yield Row("device", f"{describe_cpu()}; {chosen}")
        return
    (free, total), major_minor = torch.cuda.mem_get_info(), torch.cuda.get_device_capability()
    capability = ".".join(map(str, major_minor))
    yield Row(
        "device",
        f"{torch.cuda.get_device_name()}, compute capability {capability}, CUDA {torch.version.cuda}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {chosen}",
        numbers={"free": free, "total": total},
    )


def compare_packing(case: str, dtype: torch.dtype, packing: dict[str, Any], device: str) -> Row:
    """The same weights packed on both, and the same bytes unpacked on both."""
    torch.manual_seed(0)
    weight = torch.randn(4, 40, 24).to(dtype)
    here, there = pack_experts(weight, "w", **packing), pack_experts(weight.to(device), "w", **packing)
    differing = (here.data != there.data.cpu()).float().mean().item()
    mine, its = dense_stack(here, dtype), dense_stack(copy.deepcopy(here).to(device), dtype).cpu()
    far = (mine - its).abs().max().item() / torch.finfo(dtype).eps / mine.abs().max().item()
    return Row(
        case,
        f"{100 * differing:.2f} % of bytes differ; unpacked {far:.2g} units apart at most",
        verdict(differing < 0.01 and far <= 1, "the device packs or unpacks other numbers"),
        {"bytes_differing": differing, "units": far},
    )


def compare(case: str, way: str, dtype: torch.dtype, packing: str, size: Size, device: str) -> Row:
    """The largest differences over all layouts and routings."""
    routings = ROUTINGS if size.is_thorough else list(ROUTINGS)[:3]
    worst, wrong = (-1.0, 0.0, ""), []
    for (layout, layer), routing in itertools.product(LAYOUTS.items(), routings):
        if not ROUTINGS[routing] and way == "row by row":
            continue
        try:
            units, of_cpu = differences(layer, routing, way, dtype, packing, device)
        except RuntimeError as error:  # the others are still to be seen
            wrong.append(f"{layout}, {routing}: {last_line(str(error))}")
            continue
        for name in units:
            found = units[name], of_cpu[name], f"{layout}, {routing}: {name}"
            worst = max(worst, found)
            if not units[name] <= max(UNITS, TIMES_THE_CPU * of_cpu[name]):
                wrong.append(found[2])
    units, of_cpu, where = worst
    return Row(
        case,
        f"{units:.1f} units ({where}), CPU {of_cpu:.1f}",
        verdict(not wrong, f"{len(wrong)} are wrong, first {', '.join(wrong[:1])}"),
        {"units": units, "units_on_cpu": of_cpu},
    )


def differences(
    layer: Layer, routing: str, way: str, dtype: torch.dtype, packing: str, device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """By tensor, how far the device and the CPU are from float64, in units of the dtype's precision."""
    true, here = on_cpu(layer, routing, dtype, packing)
    there = outcome(*subject(layer, routing, dtype, packing, device), layer, way)

    def units(got: dict[str, torch.Tensor], name: str) -> float:
        if not true[name].numel():
            return 0.0
        far, largest = (got[name].cpu().double() - true[name]).abs().max(), true[name].abs().max()
        return (far / torch.finfo(dtype).eps / largest.clamp(min=1e-9)).item()

    return {name: units(there, name) for name in there}, {name: units(here, name) for name in there}


@cache
def on_cpu(layer: Layer, routing: str, dtype: torch.dtype, packing: str) -> tuple[dict, dict]:
    """Outcomes on the CPU, expert by expert: in float64, and in `dtype`."""
    experts, index_TK, tensors = subject(layer, routing, dtype, packing, "cpu")
    wide = in_float64(experts, layer), index_TK, [tensor.double() for tensor in tensors]
    return outcome(*wide, layer, "expert by expert"), outcome(experts, index_TK, tensors, layer, "expert by expert")


def subject(layer: Layer, routing: str, dtype: torch.dtype, packing: str, device: str) -> tuple:
    """Experts, routing, and tensors (tokens, routing weights, the output's gradient, factors), made on the CPU."""
    experts, lora = random_experts(layer, dtype, "cpu", PACKINGS[packing]), random_lora(layer, dtype, "cpu", RANK)
    rows = ROUTINGS[routing]
    index_TK = torch.tensor(rows, dtype=torch.long).view(len(rows), -1 if rows else layer.top_k)
    generator = torch.Generator().manual_seed(2)
    x_TH, grad_TH = torch.randn(2, len(index_TK), layer.hidden, generator=generator).to(dtype)
    weights_TK = torch.rand(index_TK.shape, generator=generator).to(dtype)
    tensors = [x_TH, weights_TK, grad_TH, *(factor for factors in lora.values() for factor in factors)]
    return experts.to(device), index_TK.to(device), [tensor.detach().to(device) for tensor in tensors]


def in_float64(experts: nn.Module, layer: Layer) -> nn.Module:
    """The experts with the numbers that they stand for, in float64."""
    wide = copy.deepcopy(experts)
    for name, *_ in projections(layer):
        stack = getattr(experts, name)
        dense = dense_stack(stack, stack.quant_state.dtype) if is_packed(stack) else stack
        setattr(wide, name, nn.Parameter(dense.double(), requires_grad=False))
    return wide.double()


def outcome(
    experts: nn.Module, index_TK: torch.Tensor, tensors: list[torch.Tensor], layer: Layer, way: str
) -> dict[str, torch.Tensor]:
    """Values and, where there are any, gradients."""
    x_TH, weights_TK, grad_TH, *factors = (tensor.detach().requires_grad_() for tensor in tensors)
    names = [name for name, *_ in projections(layer)]
    lora = updates(layer, {name: tuple(factors[2 * i : 2 * i + 2]) for i, name in enumerate(names)})
    if way == "row by row":
        with torch.no_grad():
            frozen, _ = frozen_step(experts, index_TK, lora, on_gpu())
            return {"values": run_row_by_row(x_TH, weights_TK, frozen, index_TK)}
    if way == "grouped_mm":
        y_TH = grouped_forward(experts, x_TH, index_TK, weights_TK, lora)
    else:
        step = frozen_step(experts, index_TK, lora, sizes_of(way, layer, x_TH.dtype))
        y_TH = run_frozen_experts(x_TH, weights_TK, *step)
    y_TH.backward(grad_TH)
    leaves = {"x": x_TH, "routing weights": weights_TK}
    leaves |= {f"{part} of {names[i // 2]}": factors[i] for i, part in enumerate("ABAB")}
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {"values": y_TH.detach()} | gradients


def sizes_of(way: str, layer: Layer, dtype: torch.dtype) -> WorkSizes:
    if way == "expert by expert":
        return ON_CPU
    if way == "all experts at once":
        return on_gpu()
    matrix = max(out_features * in_features for _, out_features, in_features in projections(layer)) * dtype.itemsize
    return WorkSizes(slots=1, bin_cost=2_000, row_step=8, matrices=int(way.split()[-1]) * matrix)
