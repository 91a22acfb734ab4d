"""How much slower this CPU multiplies in 16 bits than in 32: some 30 times where it has no instructions for it.

It is measured: no one function of torch says what decides (the CPU, torch's build, limits set for oneDNN).
"""

import timeit
from functools import cache

import torch


# Sides of the matrices, and how much slower is worth a word: with instructions 16 bits are the faster.
SIDE, WORTH_A_WORD = 256, 4


@cache
def slowdown(dtype: torch.dtype) -> float:
    """The time of a matrix product in `dtype` over that in fp32, on the CPU; takes some hundredths of a second."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The least of a few: what disturbs a measurement only adds to it."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=4))


def describe_cpu() -> str:
    """The CPU's capability, to stand beside what was measured on it."""
    return (
        f"CPU: {torch.backends.cpu.get_cpu_capability()} as torch has it; a product in bf16 "
        f"takes {slowdown(torch.bfloat16):.1f} times what it takes in fp32"
    )
