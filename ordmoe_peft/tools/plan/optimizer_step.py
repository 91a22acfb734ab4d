"""What a step of an optimizer holds beside its states, for as long as it takes."""

from collections.abc import Sequence

import torch

from ..._compat import FakeTensorMode
from ...training.optimizer_states import OPTIMIZERS
from .trace import MemoryTrace


# These go through all weights at once on CUDA, as torch does there unless asked otherwise (`foreach`). The others work
# weight by weight and in place.
AT_ONCE = ("adamw_torch", "sgd")


def step_temporaries(name: str, parameters: Sequence[torch.Tensor]) -> int:
    """The most bytes that a step of `name` holds beside its states and `parameters`, on a CUDA device.

    AdamW that goes through all weights at once takes the roots of all second moments at once, which are as large as the
    weights (`_multi_tensor_adam` in `torch/optim/adam.py`, 2.13).
    """
    if name not in AT_ONCE:
        return 0
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, MemoryTrace(fakes) as trace:
        numberless = [torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in parameters]
        for parameter in numberless:
            parameter.grad = torch.empty_like(parameter)
        optimizer = OPTIMIZERS[name](numberless, foreach=True)
        optimizer.step()  # makes the states
        before = trace.peak = trace.live
        optimizer.step()
    return trace.peak - before
