"""LoRA on the parameters of fused experts, applied to activations instead of weights."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .._compat import as_parameter_wrapper, experts_implementation
from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..moe_model import EXPERTS_IMPLEMENTATION
from ..quantization.offloaded import device_of_use, is_in_ram
from ..quantization.storage import is_packed, logical_shape
from .forward import LoraHandover
from .frozen import LowRank


@as_parameter_wrapper
class ExpertLora(lora_layer.ParamWrapper):
    """PEFT's [`~peft.tuners.lora.layer.ParamWrapper`] for a fused expert stack, at the cost of LoRA alone.

    PEFT's own adds the product of the factors to the whole stack in every forward. This one hands the factors to the
    experts function `"ordmoe"` as an argument, which applies them to the rows that each expert sees. Parameters, their
    names and shapes are PEFT's, so the adapter's file is too.
    """

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        """As upstream, from the logical shape: a packed stack is a column of bytes."""
        self.num_experts, in_features, out_features = logical_shape(self.get_param())
        self._param_ndim = 3
        return in_features, out_features

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As upstream, for a stack in RAM to the device that it is computed on."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for factors in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if is_in_ram(self.get_param()) and not factors.weight.is_meta:
                factors.to(device_of_use(self.get_param()))

    def low_rank(self, adapter_name: str) -> LowRank:
        """The adapter's update of all experts."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return LowRank(A, B, self.num_experts, self.scaling[adapter_name])

    def delta(self, adapter_names: list[str], expert: int) -> torch.Tensor:
        """What the adapters add to one expert's matrix, in the stack's own layout and the factors' dtype."""
        delta_OI = sum(
            update.scaling * (update.B_EOR[expert] @ update.A_ERI[expert])
            for update in map(self.low_rank, adapter_names)
        )
        return delta_OI.T if self.get_base_layer().is_transposed else delta_OI

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' deltas to the stack, one expert at a time, so that no delta of the whole stack exists.

        The deltas of all adapters are added in the wider dtype and rounded once.

        Args:
            safe_merge (`bool`, defaults to `False`): look for NaN and infinity first, before anything changes.
            adapter_names (`list[str]`, *optional*): the active adapters by default.

        Raises:
            [`OrdMoEModelError`]: the stack is packed in 4 bits, or `safe_merge` found a number that is not finite.
        """
        stack_EOI = self.get_param()
        if is_packed(stack_EOI):
            raise OrdMoEModelError(
                f"Cannot merge into {self.parameter_name} in place: its experts are packed in 4 bits. Use "
                "`merge_and_unload`, which gives a dense model."
            )
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return

        def merged(expert: int) -> torch.Tensor:
            return (stack_EOI.data[expert] + self.delta(names, expert)).to(stack_EOI.dtype)

        if safe_merge:
            for expert in range(self.num_experts):
                check_finite(merged(expert), f"{self.parameter_name} of expert {expert}", names)
        for expert in range(self.num_experts):
            stack_EOI.data[expert] = merged(expert)
        self.merged_adapters.extend(names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Pass on to the wrapped experts, with this projection's factors added to `expert_lora`."""
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.lora_A]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        update = [self.low_rank(name) for name in active]
        if "expert_lora" in kwargs:  # from the LoRA layer of the other projection, around this one
            kwargs["expert_lora"].updates[self.parameter_name] = update
            return self.base_layer(x, *args, **kwargs)
        check_takes_lora(self.get_base_layer())
        handover = LoraHandover({self.parameter_name: update})
        output = self.base_layer(x, *args, expert_lora=handover, **kwargs)
        if not handover.is_taken:
            raise OrdMoERuntimeError(
                f"{type(self.get_base_layer()).__name__} passed over the adapter on its experts: something replaced "
                "its forward, and does not hand `expert_lora` on. Take that off."
            )
        return output


def check_takes_lora(experts: nn.Module) -> None:
    """See that `experts` run OrdMoE's function, before they are given what no other takes.

    Raises:
        [`OrdMoERuntimeError`]: they do not.
    """
    implementation = experts_implementation(experts)
    if implementation != EXPERTS_IMPLEMENTATION:
        raise OrdMoERuntimeError(
            f"{type(experts).__name__} runs experts_implementation={implementation!r}, which does not apply the "
            f"adapter. Call model.set_experts_implementation({EXPERTS_IMPLEMENTATION!r}), or unload the adapter."
        )
    # A patch of this module's forward has its own arguments; accelerate's hooks pass all on.
    if "forward" in vars(experts) and not _takes_expert_lora(experts.forward):
        raise OrdMoERuntimeError(
            f"The forward of {type(experts).__name__} was replaced by one that takes no `expert_lora`, so the adapter "
            "would be passed over. Take that off, or let it hand further arguments on."
        )


def _takes_expert_lora(forward: Callable) -> bool:
    parameters = inspect.signature(forward, follow_wrapped=False).parameters
    return "expert_lora" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_finite(weight: torch.Tensor, name: str, adapter_names: list[str]) -> None:
    """Raise [`OrdMoEModelError`] where a merged weight is not finite."""
    if not torch.isfinite(weight).all():
        raise OrdMoEModelError(
            f"Merging {adapter_names} would put NaN or infinity into {name}, so nothing was merged there. The adapter "
            "seems to be broken, or its deltas do not fit into the base's dtype."
        )
