"""The experts function `"ordmoe"`: one forward for every class of fused experts, dense or in 4 bits, with LoRA.

It takes the place of `grouped_mm_experts_forward` (`transformers/integrations/moe.py`) and reads the same flags. On
dense weights it runs the same operations in the same order, so a model's outputs do not change by a bit.

Shape suffixes as in `ops/__init__.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import OrdMoEModelError
from ..ops.dispatch import ExpertGroups, combine_by_token, group_by_expert
from ..ops.grouped_linear import grouped_lora, grouped_matmul, packed_grouped_matmul
from ..quantization.storage import expert_unpacker, is_packed, logical_shape


@dataclass(frozen=True)
class LoraFactors:
    """The low-rank update of one projection of all experts.

    Args:
        A_ERI (`torch.Tensor` of shape `(E, R, I)`), B_EOR (`torch.Tensor` of shape `(E, O, R)`): the factors.
        scaling (`float`): alpha / r, or alpha / √r with rsLoRA.
    """

    A_ERI: torch.Tensor
    B_EOR: torch.Tensor
    scaling: float


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    expert_lora: dict[str, list[LoraFactors]] | None = None,
) -> torch.Tensor:
    """Run each token through its K experts and sum their outputs by routing weight.

    Args:
        self (`nn.Module`): a class decorated with `transformers.integrations.use_experts_implementation`.
        hidden_states (`torch.Tensor` of shape `(T, H)`): tokens.
        top_k_index (`torch.Tensor` of shape `(T, K)`): each token's experts.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): their weights.
        expert_lora (`dict`, *optional*): projection name → the active adapters' factors.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `hidden_states`.
    """
    if self._is_expert_parallel:
        raise OrdMoEModelError(
            f"{type(self).__name__} is sharded by expert parallelism, which OrdMoE's experts do not support: load the "
            "model without `ep_size`."
        )
    lora = expert_lora or {}
    groups = group_by_expert(top_k_index, self.num_experts)
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    rows_NH = hidden_states[groups.token_N]
    rows_NF = _project(self, up_name, rows_NH, top_k_index, groups, lora)
    rows_NF = self._apply_gate(rows_NF) if self.has_gate else self.act_fn(rows_NF)
    rows_NH = _project(self, "down_proj", rows_NF, top_k_index, groups, lora)
    if self.has_post_expert_norm:
        rows_NH = self.post_expert_norm(rows_NH)
    rows_NH = rows_NH * top_k_weights.reshape(-1)[groups.order_N].unsqueeze(-1)
    return combine_by_token(rows_NH, groups).to(hidden_states.dtype)


def _project(
    experts: nn.Module,
    name: str,
    x_NI: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    groups: ExpertGroups,
    lora: dict[str, list[LoraFactors]],
) -> torch.Tensor:
    """One projection of all routed rows: base weight, bias and low-rank updates."""
    weight = getattr(experts, name)
    if is_packed(weight):
        y_NO = _packed_project(x_NI, weight, groups, experts.is_transposed)
    else:
        y_NO = grouped_matmul(
            x_NI.to(weight.dtype), weight if experts.is_transposed else weight.transpose(1, 2), groups.ends_E
        )
    if experts.has_bias:
        y_NO = y_NO + getattr(experts, f"{name}_bias")[top_k_index_TK.reshape(-1)[groups.order_N]]
    for factors in lora.get(name, ()):
        A_ERI, B_EOR = factors.A_ERI.to(y_NO.dtype), factors.B_EOR.to(y_NO.dtype)
        y_NO = y_NO + grouped_lora(x_NI.to(y_NO.dtype), A_ERI, B_EOR, factors.scaling, groups.ends_E)
    return y_NO


def _packed_project(x_NI: torch.Tensor, weight, groups: ExpertGroups, is_transposed: bool) -> torch.Tensor:
    unpack = expert_unpacker(weight)
    out_features = logical_shape(weight)[2 if is_transposed else 1]
    y_NO = packed_grouped_matmul(
        x_NI.to(weight.quant_state.dtype),
        unpack if is_transposed else lambda expert: unpack(expert).T,
        out_features,
        groups.ends_E,
    )
    return y_NO.to(x_NI.dtype)
