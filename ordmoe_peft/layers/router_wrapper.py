"""LoRA on the weight of a router."""

from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch.func import functional_call


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
        weight = self.get_param()
        for name in active:
            weight = weight + self.get_delta_weight(name)
        return functional_call(self.base_layer, {self.parameter_name: weight}, (x, *args), kwargs)
