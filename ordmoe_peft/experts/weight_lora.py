"""LoRA on a weight of any module, swapped in for a call: of a router, or of stacks outside the experts interface."""

import threading
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from torch import nn
from torch.func import functional_call

from .._compat import as_parameter_wrapper
from ..quantization.storage import is_packed, logical_shape
from ..quantization.unpacked_forward import unpacked_stack


# While a module runs, its weight is replaced, and no other thread's forward may find the replacement. One lock serves
# all: a lock of each would keep models from being copied and pickled, and a router's work on the host is short.
_one_at_a_time = threading.RLock()


@as_parameter_wrapper
class WeightLora(lora_layer.ParamWrapper):
    """PEFT's [`~peft.tuners.lora.layer.ParamWrapper`], with the adapted weight swapped in for a call.

    PEFT's own registers and removes a parametrization in every forward, which makes a class each time: more than a
    decoding step's router costs. The module itself is called, so whatever replaced its forward (accelerate's hooks, a
    compiled one, a patch) sees the adapted weight. As with PEFT's own, that of stacks is as large as they are.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """As upstream, from the logical shape: a packed stack is a column of bytes."""
        if not is_packed(self.get_param()):
            return super()._get_in_out_features(module)
        self.num_experts, in_features, out_features = logical_shape(self.get_param())
        self._param_ndim = 3
        return in_features, out_features

    @torch.compiler.disable(reason="OrdMoE swaps the weight under a lock")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = first_tensor(*args, **kwargs)
        self._check_forward_args(x, **kwargs)
        with _one_at_a_time:
            if self.disable_adapters and self.merged:
                self.unmerge()
            is_off = self.disable_adapters or self.merged
            active = [] if is_off else [name for name in self.active_adapters if name in self.lora_A]
            if not active:
                return self.base_layer(*args, **kwargs)
            weight = self.get_param()
            weight = unpacked_stack(weight, x.dtype) if is_packed(weight) else weight
            for name in active:
                weight = weight + self.get_delta_weight(name).to(weight.dtype)
            adapted = {f"{self._path_to_module()}{self.parameter_name}": weight}
            return functional_call(self.base_layer, adapted, args, kwargs, tie_weights=False)

    def _path_to_module(self) -> str:
        """From what this wraps to the module that has the weight: one step for each wrapper between."""
        module, path = self.base_layer, ""
        while isinstance(module, lora_layer.ParamWrapper):
            module, path = module.base_layer, f"base_layer.{path}"
        return path


def first_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The first floating-point tensor among the arguments of a call, by position or by name: the hidden states."""
    values = (*args, *kwargs.values())
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


class _Forward(nn.Module):
    """A module's forward without its hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def run_again(module: nn.Module, *args: Any, with_lora: bool = True, **kwargs: Any) -> Any:
    """`module.forward(*args, **kwargs)` beside the run that counts: hooks do not run, random numbers and inputs stay as
    they are. Without `with_lora`, updates of LoRA layers that the module holds are 0.
    """
    lora = () if with_lora else module.named_parameters()
    nothing = {name: torch.zeros_like(weight) for name, weight in lora if ".lora_B." in name}
    if module.training:  # some routers multiply noise into their inputs in place
        args = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
        kwargs = {name: arg.clone() if isinstance(arg, torch.Tensor) else arg for name, arg in kwargs.items()}
    devices = {weight.device for weight in module.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices, enabled=module.training):
        return forward_with(module, nothing, *args, **kwargs)


def forward_with(module: nn.Module, weights: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """`module.forward(*args, **kwargs)` with `weights` in place of its own of these names. Its hooks do not run."""
    swapped = {f"module.{name}": weight for name, weight in weights.items()}
    with _one_at_a_time:
        return functional_call(_Forward(module), swapped, args, kwargs, tie_weights=False)
