"""LoRA on the weight of a router."""

from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch import nn
from torch.func import functional_call

from .kept import keep, may_be_kept


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
        weight = self._weight(x, active)
        if isinstance(weight, nn.Parameter):
            return self._call_with(weight, x, *args, **kwargs)
        # No tied weights to look for: that walks over the module in every call.
        return functional_call(self.base_layer, {self.parameter_name: weight}, (x, *args), kwargs, tie_weights=False)

    def _call_with(self, weight: nn.Parameter, *args: Any, **kwargs: Any) -> Any:
        """What `functional_call` does, for one parameter in a tenth of the time."""
        base_weight = self.get_param()
        setattr(self.base_layer, self.parameter_name, weight)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            setattr(self.base_layer, self.parameter_name, base_weight)

    def _weight(self, x: torch.Tensor, active: list[str]) -> torch.Tensor:
        """The router's weight with the deltas of these adapters, to run on `x`; a parameter where it is kept."""

        def adapted() -> torch.Tensor:
            weight = self.get_param()
            for name in active:
                weight = weight + self.get_delta_weight(name)
            return weight

        factors = (self.get_param(), *(half[name].weight for name in active for half in (self.lora_A, self.lora_B)))
        kept = self.__dict__.setdefault("kept", {})
        if not may_be_kept(*factors):
            kept.clear()
            return adapted()
        key = (torch.is_autocast_enabled(x.device.type), *active, *(self.scaling[name] for name in active))
        if key not in kept:  # one weight is kept, whatever adapters and scales it has had
            kept.clear()
        return keep(kept, key, factors, lambda: nn.Parameter(adapted(), requires_grad=False))
