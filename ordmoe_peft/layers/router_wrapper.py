"""LoRA on the weight of a router."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch import nn

from .kept import keep


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's [`~peft.tuners.lora.layer.ParamWrapper`] for the weight of a router, swapped in for a call.

    PEFT's own registers and removes a parametrization in every forward, which makes a class each time: more than a
    decoding step's router costs.

    It bears the same name because PEFT recognises wrappers that it may adapt again by their class name
    (`BaseTuner._inject_parameters`).
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.lora_A]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        halves = [half[name] for name in active for half in (self.lora_A, self.lora_B)]
        settings = (torch.is_autocast_enabled(x.device.type), *halves, *(self.scaling[name] for name in active))
        weight = keep(self, settings, partial(self._to_keep, active, halves))
        return self._with_weight(self._weight(active) if weight is None else weight)(x, *args, **kwargs)

    def _with_weight(self, weight: torch.Tensor) -> nn.Module:
        """The router with this weight: a module of its own for one call, which shares all else.

        `torch.func.functional_call` would put the weight into the router for as long as it runs, where another thread's
        forward finds it, and may leave it.
        """
        router = self.base_layer
        twin = object.__new__(type(router))
        twin.__dict__.update(router.__dict__)
        twin._parameters = {**router._parameters, self.parameter_name: weight}
        return twin

    def _weight(self, active: list[str]) -> torch.Tensor:
        """The router's weight with the deltas of these adapters."""
        weight = self.get_param()
        for name in active:
            weight = weight + self.get_delta_weight(name)
        return weight

    def _to_keep(self, active: list[str], halves: list[nn.Module]) -> tuple[torch.Tensor, list[tuple[nn.Module, str]]]:
        """The same, and what it is made of."""
        sources = [(self.get_base_layer(), self.parameter_name), *((half, "weight") for half in halves)]
        return self._weight(active), sources
