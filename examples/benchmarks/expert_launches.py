"""How many operations the experts of one MoE layer take, and how often the host waits: what bounds a GPU.

    python -m examples.benchmarks.expert_launches

Counted on CPU, with fake tensors of full size, on the code that a GPU runs: operators that would launch a kernel, which
leaves out views and allocations; moments in which the host needs a number from the device; and copies to the device.
Memory is what autograd keeps between forward and backward, and the peak in each, over weights and inputs.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import HfArgumentParser

from ordmoe_peft._compat import FakeTensorMode
from ordmoe_peft.cli.tables import print_table
from ordmoe_peft.experts.forward import forward_on_host, frozen_step, grouped_forward
from ordmoe_peft.experts.frozen import LowRank, run_frozen_experts
from ordmoe_peft.experts.tuning import ON_CPU, WorkSizes, on_gpu
from ordmoe_peft.tools.plan.trace import MemoryTrace, fake_of

from .layers import DECODING, LAYERS, Layer, R, empty_experts, projections, routing, stack_shape


DECODED_TOKENS = (1, 8, 32)
# Operators that launch nothing: views, allocations, and what reads a number on the host, which is counted by itself.
VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device", "expand", "lift_fresh", "permute"),
    *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze"),
    "view",
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
# What makes the host wait for the device; `item` and its like are `_local_scalar_dense` to the dispatcher.
WAITING_METHODS = {"tolist", "cpu", "numpy"}
WAITING_OPERATORS = {"_local_scalar_dense", "_unique2", "bincount", "masked_select", "nonzero", "unique_consecutive"}


@dataclass
class Options:
    """What to count."""

    budgets: list[int] = field(default_factory=lambda: [64, 128], metadata={"help": "MiB of matrices at a time."})


@dataclass
class Counts:
    """What a run of a layer takes."""

    launches: int = 0
    waits: int = 0
    uploads: int = 0
    by_name: Counter = field(default_factory=Counter)


class CountingTrace(MemoryTrace):
    """[`MemoryTrace`] that also counts operators."""

    counts: Counts

    def _run(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        self.counts.waits += name in WAITING_OPERATORS
        if name not in VIEWS | ALLOCATIONS | WAITING_OPERATORS:
            self.counts.launches += 1
            self.counts.by_name[name] += 1
        return super()._run(func, args, kwargs)


class HostWatch(ExitStack):
    """Within the block, counts what the host reads from tensors and makes of its own numbers. In backward, too, where
    torch's function modes do not reach."""

    counts: Counts

    def __enter__(self) -> "HostWatch":
        for name in WAITING_METHODS:
            self._watch(torch.Tensor, name, self.note_wait)
        for name in ("tensor", "as_tensor"):
            self._watch(torch, name, self.note_upload)
        return super().__enter__()

    def note_wait(self) -> None:
        self.counts.waits += 1

    def note_upload(self) -> None:
        self.counts.uploads += 1

    def _watch(self, owner: Any, name: str, note: Callable[[], None]) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            note()
            return function(*args, **kwargs)

        self.enter_context(mock.patch.object(owner, name, watched))


def main() -> None:
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    paths = {"NF4, expert by expert": ON_CPU}
    paths |= {f"NF4, {budget} MiB at a time": on_gpu(budget) for budget in options.budgets}
    rows = [
        [name, path, *described(count_step(layer, sizes))]
        for name, layer in LAYERS.items()
        for path, sizes in paths.items()
    ]
    rows += [
        [name, path, *described(count_step(layer, sizes, packed=False))]
        for name, layer in list(LAYERS.items())[:1]
        for path, sizes in {"dense, 128 MiB at a time": on_gpu(), "dense, grouped_mm as one kernel": None}.items()
    ]
    columns = ["layer", "path", "forward", "waits", "uploads", "backward", "waits", "MiB kept", "peak", "peak backward"]
    print_table("Operators of one MoE layer with LoRA r 16, bf16, 4 bits with double quantisation", columns, rows)
    rows = []
    for name, budget in itertools.product(DECODING, options.budgets):
        counts = [count_decoding(replace(DECODING[name], tokens=tokens), on_gpu(budget)) for tokens in DECODED_TOKENS]
        rows.append([name, str(budget), *(f"{each.launches}, {each.waits}" for each in counts)])
    columns = ["layer", "MiB at a time", *(f"{tokens} tokens" for tokens in DECODED_TOKENS)]
    print_table("\nA forward without gradients, as in decoding: operators, waits", columns, rows)


def described(figures: tuple[Counts, Counts, int, int, int]) -> list[str]:
    """The cells of a row."""
    forward, backward, *memory = figures
    cells = [forward.launches, forward.waits, forward.uploads, backward.launches, backward.waits]
    return [f"{cell:,}" for cell in (*cells, *(round(size / 2**20) for size in memory))]


def count_step(
    layer: Layer, sizes: WorkSizes | None, packed: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[Counts, Counts, int, int, int]:
    """Run a layer forward and backward without its numbers.

    Args:
        layer ([`Layer`]): what to run.
        sizes ([`~ordmoe_peft.experts.tuning.WorkSizes`], *optional*): how; through `grouped_mm` by default.
        packed (`bool`, defaults to `True`): in NF4 with double quantisation, rather than dense.
        dtype (`torch.dtype`, defaults to bfloat16): of activations and factors.

    Returns:
        What forward and backward take, and in bytes what is kept between them, and the peak of each.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    experts, lora, x_TH, index_TK, weights_TK = build(layer, packed, dtype, fakes)
    at_hand = [
        x_TH,
        weights_TK,
        *experts.parameters(),
        *(factor for update in lora.values() for factor in (update[0].A, update[0].B)),
    ]
    trace, watch = CountingTrace(fakes, at_hand), HostWatch()
    forward, backward = Counts(), Counts()
    with fakes, trace, watch:
        trace.counts = watch.counts = forward
        if sizes is None:
            y_TH = grouped_forward(experts, x_TH, index_TK, weights_TK, lora)
        else:
            y_TH = run_frozen_experts(x_TH, weights_TK, *frozen_step(experts, index_TK, lora, sizes))
        kept, peak = trace.live, trace.peak
        trace.counts, watch.counts, trace.peak = backward, backward, trace.live
        y_TH.backward(torch.empty_like(y_TH))
    return forward, backward, kept, peak, trace.peak


def count_decoding(layer: Layer, sizes: WorkSizes, dtype: torch.dtype = torch.bfloat16) -> Counts:
    """What a forward of few tokens takes without gradients, on packed experts."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    experts, lora, x_TH, index_TK, weights_TK = build(layer, True, dtype, fakes)
    trace, watch, counts = CountingTrace(fakes), HostWatch(), Counts()
    trace.counts = watch.counts = counts
    with torch.no_grad(), fakes, trace, watch:
        forward_on_host(experts.eval(), x_TH, index_TK, weights_TK, lora, sizes)
    return counts


# ---------------------------------------------------------------------------------------------------------- the layer
def build(layer: Layer, packed: bool, dtype: torch.dtype, fakes: FakeTensorMode) -> tuple:
    """Experts, factors of both projections, tokens, routing and its weights; only the routing has numbers."""

    def leaf(*shape: int) -> nn.Parameter:
        return nn.Parameter(fake_of(torch.empty(*shape, dtype=dtype, device="meta"), fakes))

    experts = empty_experts(layer, dtype)
    lora = {}
    for name, out_features, in_features in projections(layer):
        shape = stack_shape(layer, out_features, in_features)
        weight = packed_without_bytes(shape, dtype) if packed else leaf(*shape)
        experts.register_parameter(name, weight.requires_grad_(False))
        if layer.has_bias:
            experts.register_parameter(f"{name}_bias", leaf(layer.experts, out_features).requires_grad_(False))
        A, B = leaf(layer.experts * R, in_features), leaf(out_features, R * layer.experts)
        lora[name] = [LowRank(A, B, layer.experts, 2.0)]
    return experts, lora, leaf(layer.tokens, layer.hidden), routing(layer), leaf(layer.tokens, layer.top_k)


def packed_without_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> Params4bit:
    """A stack in NF4 with double quantisation, on the meta device."""

    def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    numbers = torch.Size(shape).numel()
    scales = bnb_functional.QuantState(
        absmax=on_meta(-(-numbers // 64 // 256)), code=on_meta(256), blocksize=256, dtype=torch.float32
    )
    state = bnb_functional.QuantState(
        absmax=on_meta(numbers // 64, dtype=torch.uint8),
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=64,
        code=on_meta(16),
        quant_type="nf4",
        offset=on_meta(),
        state2=scales,
    )
    return Params4bit(
        on_meta(numbers // 2, 1, dtype=torch.uint8),
        requires_grad=False,
        quant_state=state,
        compress_statistics=True,
        bnb_quantized=True,
    )


if __name__ == "__main__":
    main()
