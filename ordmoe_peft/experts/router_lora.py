"""LoRA on the weight of a router."""

import threading
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch.func import functional_call

from .._compat import as_parameter_wrapper


# While a router runs, its weight is replaced, and no other thread's forward may find the replacement. One lock serves
# all routers: a lock of each would keep models from being copied and pickled, and a router's work on the host is short.
_one_router_at_a_time = threading.RLock()


@as_parameter_wrapper
class RouterLora(lora_layer.ParamWrapper):
    """PEFT's [`~peft.tuners.lora.layer.ParamWrapper`] for the weight of a router, swapped in for a call.

    PEFT's own registers and removes a parametrization in every forward, which makes a class each time: more than a
    decoding step's router costs. The router itself is called, so whatever replaced its forward (accelerate's hooks, a
    compiled one, a patch) sees the adapted weight.
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
            weight = self.get_param()
            for name in active:
                weight = weight + self.get_delta_weight(name)
            adapted = {self.parameter_name: weight}
            return functional_call(self.base_layer, adapted, (x, *args), kwargs, tie_weights=False)
