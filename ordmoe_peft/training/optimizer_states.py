"""What the states of an optimizer take, by the names of the training argument `optim`."""

from collections.abc import Iterator, Sequence

import torch
from bitsandbytes.optim import AdamW8bit
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from .._compat import storage_id


# Fused AdamW has the states of the plain one, which also runs without numbers. Paged states count in full: they move to
# the host under pressure only.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw_torch_fused": AdamW,
    "adamw_torch": AdamW,
    "adamw_8bit": AdamW8bit,
    "adamw_bnb_8bit": AdamW8bit,
    "paged_adamw_8bit": AdamW8bit,
    "sgd": SGD,
}


def optimizer_bytes(name: str, parameters: Sequence[torch.Tensor]) -> int:
    """The states of `name` for `parameters`, in bytes: those that a step of it makes on the meta device.

    An optimizer that is not in [`OPTIMIZERS`] is taken to have AdamW's, two for each parameter in its dtype.
    """
    numberless = [torch.nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    if not numberless:
        return 0
    for parameter in numberless:
        parameter.grad = torch.empty_like(parameter)
    optimizer = OPTIMIZERS.get(name, AdamW)(numberless)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    storages = [state.untyped_storage() for state in states if isinstance(state, torch.Tensor)]
    # 8-bit states share their tables of numbers.
    return sum({storage_id(storage): storage.nbytes() for storage in storages}.values())


def missing_bytes(name: str, optimizer: Optimizer) -> int:
    """What of the states of `optimizer`, which is of this name, its next step has yet to make, in bytes.

    Optimizers make them at their first step; a run that is resumed has them before.
    """
    return optimizer_bytes(name, [local(p) for p in trained(optimizer) if not optimizer.state.get(p)])


def trained(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """The parameters that `optimizer` moves."""
    return (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
