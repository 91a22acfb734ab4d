"""Run a forward twice with the same dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that a forward draws from: the CPU's and that of its device.

    Args:
        device (`torch.device`): where the forward runs.
        cpu_state (`torch.Tensor`), device_state (`torch.Tensor`, *optional*): the states.
    """

    device: torch.device
    cpu_state: torch.Tensor
    device_state: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The state at this moment."""
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), own)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within the block draws are those that came after [`RandomState.now`]; the others are not disturbed."""
        is_cpu = self.device.type == "cpu"
        kind = {} if is_cpu else {"device_type": self.device.type}
        with torch.random.fork_rng(devices=[] if is_cpu else [self.device], **kind):
            torch.set_rng_state(self.cpu_state)
            if not is_cpu:
                torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
            yield
