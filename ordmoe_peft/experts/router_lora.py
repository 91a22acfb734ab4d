"""LoRA on the weight of a router."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch import nn


# A router's weight is another one while it runs, which no other thread's forward may find. One lock serves all routers:
# a lock of each would keep models from being copied and pickled, and a router's own work on the host is short.
_one_router_at_a_time = threading.RLock()


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's [`~peft.tuners.lora.layer.ParamWrapper`] for the weight of a router, swapped in for a call.

    PEFT's own registers and removes a parametrization in every forward, which makes a class each time: more than a
    decoding step's router costs. The router itself is called, so whatever replaced its forward (accelerate's hooks, a
    compiled one, a patch) sees the adapted weight.

    It bears the same name because PEFT recognises wrappers that it may adapt again by their class name
    (`BaseTuner._inject_parameters`).
    """

    @torch.compiler.disable(reason="OrdMoE swaps the router's weight under a lock")
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check_forward_args(x, *args, **kwargs)
        with _one_router_at_a_time:
            if self.disable_adapters and self.merged:
                self.unmerge()
            is_off = self.disable_adapters or self.merged
            active = [] if is_off else [name for name in self.active_adapters if name in self.lora_A]
            if not active:
                return self.base_layer(x, *args, **kwargs)
            with swapped(self.base_layer, self.parameter_name, self._weight(active)):
                return self.base_layer(x, *args, **kwargs)

    def _weight(self, active: list[str]) -> torch.Tensor:
        """The router's weight with the deltas of these adapters."""
        weight = self.get_param()
        for name in active:
            weight = weight + self.get_delta_weight(name)
        return weight


@contextmanager
def swapped(module: nn.Module, name: str, weight: torch.Tensor) -> Iterator[None]:
    """Within the block, `module` has `weight` in place of its parameter `name`."""
    # Replicas of nn.DataParallel have no parameters, but tensors as attributes.
    holder = module._parameters if name in module._parameters else module.__dict__
    own, holder[name] = holder[name], weight
    try:
        yield
    finally:
        holder[name] = own
