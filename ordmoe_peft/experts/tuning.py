"""How much of a layer's experts one operation takes, by device. These numbers change time and memory; of the results
they change the rounding alone.

Those of the CPU were measured, on two cores of an AMD EPYC with torch 2.13:

| constant | value | unit | how to measure again |
| --- | --- | --- | --- |
| `BIN_COST_BYTES` | 600,000 | bytes of slots | time of `expert_step --bases dense` at half and twice the value |
| `MAX_BIN_COUNTS` | 16 | counts of experts | resident memory of `expert_step`: 868 MB without (wide, bf16) |
| `ROW_STEP` | 4 | rows | the same: 716 MB, 1,053 with 1; 5 % slower with 8 |
| `CHUNK_BYTES` | 2,000,000 | bytes of up-projection outputs | memory and time of `expert_step --bases dense` |
| `LARGE_EXPERT`, `PIECE` | 2²⁰, 2¹⁸ | weights | the same with `--bases nf4 --memory_steps 16`, see below |
| `FEW_ROWS` | 160 | routed rows | time of `expert_inference --tokens 8 16 32` at 0 and at the value |
| `ROWS_BY_ROW` | 24 | routed rows | time of `expert_inference --tokens 1 2 4` at 0 and at the value |

The commands are `python -m examples.benchmarks.<name>`. On a shared machine compare the least of several runs that take
turns. Those of GPUs ([`on_gpu`]) were chosen by counting operations (`expert_launches`); none was measured on a card.
"""

from dataclasses import dataclass
from functools import cache

import torch


MIB = 2**20

# What the products of LoRA with one more bin of experts cost, as bytes of slots that they read and write, all widths
# together.
BIN_COST_BYTES = 600_000
# In 16 bits oneDNN compiles a kernel for each shape of a product (about 1 ms) and keeps it (about 0.65 MB), so shapes
# are few: experts enter bins in groups of a MAX_BIN_COUNTS-th of them, and rows are rounded up to ROW_STEP.
MAX_BIN_COUNTS = 16
ROW_STEP = 4
# The size of the up-projection's output for the slots that are worked on at a time: large enough to be worth the
# operations, and small, so that little exists beside what is kept for backward.
CHUNK_BYTES = 2_000_000
# On CPU in 16 bits, packed experts of so many weights and more are unpacked PIECE weights at a time. A large tensor
# that is freed leaves a hole in malloc's memory, where one of oneDNN's kernels settles, so that the next tensor does
# not fit: with experts of 2²¹ weights unpacked whole, a process grew to 2.0 GB in 16 steps, by pieces to 0.44 GB.
# Pieces cost a copy, 6 % of a step, so smaller experts are not cut.
LARGE_EXPERT = 1 << 20
PIECE = 1 << 18
# Routed rows up to which `few_rows.py` is the faster way without gradients, and up to which its products with A are row
# by row there: fewer operations than a gather for each expert and a product with all of them.
FEW_ROWS = 160
ROWS_BY_ROW = 24


@dataclass(frozen=True)
class WorkSizes:
    """How much one operation takes.

    Args:
        slots (`int`): bytes of the up-projection's output for the slots that are worked on at a time.
        bin_cost (`int`): what one more bin costs, as bytes of slots, all widths together.
        row_step (`int`): see [`~ordmoe_peft.experts.layout.lay_out_by_expert`], in 16 bits.
        matrices (`int`, *optional*): the most bytes of experts' matrices that exist at a time. Without it there is one
            matrix.
    """

    slots: int
    bin_cost: int
    row_step: int
    matrices: int | None


ON_CPU = WorkSizes(CHUNK_BYTES, BIN_COST_BYTES, ROW_STEP, None)


def on_gpu(matrices_mib: int = 128) -> WorkSizes:
    """Few and large operations, since the host takes some microseconds to launch each.

    Args:
        matrices_mib (`int`, defaults to 128): MiB of experts' matrices that exist at a time, unpacked in one call.
    """
    return WorkSizes(slots=32 * MIB, bin_cost=4 * MIB, row_step=8, matrices=matrices_mib * MIB)


@cache
def work_sizes(device: torch.device) -> WorkSizes:
    """The sizes for `device`. On CUDA they depend on the memory that is free when this is first asked for, and stay."""
    if device.type == "cpu":
        return ON_CPU
    if device.type != "cuda":
        return on_gpu()
    return on_gpu_with(free_on_cuda(device))


def free_on_cuda(device: torch.device) -> int:
    """Bytes that are free on a CUDA device. What torch's allocator holds unused is free as well."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def on_gpu_with(free: int) -> WorkSizes:
    """The sizes for a GPU with `free` bytes: a 64th of them, in powers of two from 32 to 128 MiB, is for the experts'
    matrices."""
    share = free // 64 // MIB
    return on_gpu(max(32, min(128, 1 << share.bit_length() - 1 if share else 0)))


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.nn.functional.grouped_mm` is one kernel there: in bf16 on NVIDIA's cards of compute capability 9
    and 10. Elsewhere it is a loop over the experts on the host, which waits for the device first (torch 2.13,
    `aten/src/ATen/native/cuda/GroupedBlas.cpp`)."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and is_one_kernel(torch.cuda.get_device_capability(device)[0], dtype)


def is_one_kernel(capability: int, dtype: torch.dtype) -> bool:
    """[`has_grouped_kernel`] of a CUDA device of that compute capability."""
    return dtype == torch.bfloat16 and capability in (9, 10)
