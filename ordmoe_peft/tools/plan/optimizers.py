"""What the states of an optimizer take, by the names of the training argument `optim`."""

from collections.abc import Callable, Sequence

import torch


# bitsandbytes' 8-bit optimizers (0.50.2, `bitsandbytes/optim/optimizer.py`): tensors smaller than this keep fp32
# states; of the others, each block has an fp32 scale, and all share two tables of 256 fp32 numbers.
LEAST_8BIT_NUMEL, BLOCK_8BIT, TABLES_8BIT = 4096, 256, 2 * 256 * 4


def _adamw(parameter: torch.Tensor) -> int:
    """Two moments in the parameter's dtype and a step count."""
    return 2 * parameter.nbytes + 4


def _adamw_8bit(parameter: torch.Tensor) -> int:
    """Two moments in 8 bits with their scales."""
    numel = parameter.numel()
    if numel < LEAST_8BIT_NUMEL:
        return 2 * 4 * numel
    return 2 * (numel + 4 * -(-numel // BLOCK_8BIT))


def _sgd(parameter: torch.Tensor) -> int:
    return 0


# What `optim` is called → bytes for a parameter. Paged states count in full: they move to the host under pressure only.
OPTIMIZERS: dict[str, Callable[[torch.Tensor], int]] = {
    "adamw_torch_fused": _adamw,
    "adamw_torch": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adamw_bnb_8bit": _adamw_8bit,
    "paged_adamw_8bit": _adamw_8bit,
    "sgd": _sgd,
}


def optimizer_bytes(name: str, parameters: Sequence[torch.Tensor]) -> int:
    """The states of `name` for `parameters`, in bytes."""
    shared = TABLES_8BIT if OPTIMIZERS[name] is _adamw_8bit else 0
    return shared + sum(map(OPTIMIZERS[name], parameters))
