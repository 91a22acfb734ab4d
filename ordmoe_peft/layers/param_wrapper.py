"""LoRA on the parameters of fused experts, applied to activations instead of weights."""

from typing import Any

import torch
from peft.tuners.lora import layer as lora_layer

from ..errors import OrdMoEModelError
from ..ops.frozen_experts import LowRank
from ..quantization.storage import is_packed, logical_shape


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's [`~peft.tuners.lora.layer.ParamWrapper`] for a fused expert stack, at the cost of LoRA alone.

    PEFT's own adds the product of the factors to the whole stack in every forward. This one hands the factors to the
    experts function `"ordmoe"` as an argument, which applies them to the rows that each expert sees. Parameters, their
    names and shapes, and merging are PEFT's, so the adapter's file is too.

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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if is_packed(self.get_param()):
            raise OrdMoEModelError(
                f"Cannot merge into {self.parameter_name}: its experts are packed in 4 bits. Load the base without a "
                "quantization_config, load the adapter on it, and merge there."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Pass on to the wrapped experts, with this projection's factors added to `expert_lora`."""
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.lora_A]
        if active:
            expert_lora = kwargs.pop("expert_lora", {})
            kwargs["expert_lora"] = {**expert_lora, self.parameter_name: [self.low_rank(name) for name in active]}
        return self.base_layer(x, *args, **kwargs)
