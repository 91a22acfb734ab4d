"""LoRA on the parameters of fused experts, applied to activations instead of weights."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..errors import OrdMoEModelError
from ..ops.frozen_experts import B_by_expert, LowRank
from ..quantization.storage import is_packed, logical_shape
from .kept import keep


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's [`~peft.tuners.lora.layer.ParamWrapper`] for a fused expert stack, at the cost of LoRA alone.

    PEFT's own adds the product of the factors to the whole stack in every forward. This one hands the factors to the
    experts function `"ordmoe"` as an argument, which applies them to the rows that each expert sees. Parameters, their
    names and shapes are PEFT's, so the adapter's file is too.

    It bears the same name because PEFT recognises wrappers that it may nest by their class name
    (`BaseTuner._inject_parameters`).
    """

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        """Like upstream, from the logical shape: a packed stack is a column of bytes."""
        self.num_experts, in_features, out_features = logical_shape(self.get_param())
        self._param_ndim = 3
        return in_features, out_features

    def low_rank(self, adapter_name: str) -> LowRank:
        """The adapter's update of all experts."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return LowRank(A, B, self.num_experts, self.scaling[adapter_name])

    def _low_rank_to_run(self, adapter_name: str) -> LowRank:
        """The same, ready for the products where that may be kept: A scaled and in their dtype, B by expert, too."""
        halves = self.lora_A[adapter_name], self.lora_B[adapter_name]
        settings = (*halves, self.scaling[adapter_name])
        kept = keep((self, adapter_name), settings, partial(self._ready_for_products, adapter_name, halves))
        return self.low_rank(adapter_name) if kept is None else kept

    def _ready_for_products(self, adapter_name: str, halves: tuple[nn.Module, nn.Module]) -> tuple:
        """That, and what it is made of."""
        weight, update = self.get_param(), self.low_rank(adapter_name)
        dtype = weight.quant_state.dtype if is_packed(weight) else weight.dtype
        A = (update.A * update.scaling).to(dtype)
        ready = replace(update, A=A, scaling=1.0, B_ERO=B_by_expert(update, dtype))
        return ready, [(half, "weight") for half in halves]

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
        if active:
            expert_lora = kwargs.pop("expert_lora", {})
            kwargs["expert_lora"] = {
                **expert_lora,
                self.parameter_name: [self._low_rank_to_run(name) for name in active],
            }
        return self.base_layer(x, *args, **kwargs)


def check_finite(weight: torch.Tensor, name: str, adapter_names: list[str]) -> None:
    """Raise [`OrdMoEModelError`] where a merged weight is not finite."""
    if not torch.isfinite(weight).all():
        raise OrdMoEModelError(
            f"Merging {adapter_names} would put NaN or infinity into {name}, so nothing was merged there. The adapter "
            "seems to be broken, or its deltas do not fit into the base's dtype."
        )
