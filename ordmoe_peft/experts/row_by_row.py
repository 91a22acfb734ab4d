"""Frozen experts with low-rank updates on few rows, as in decoding, without gradients. On GPUs.

Each routed row gets the matrices of its own expert, all rows at once: the experts hit are gathered and unpacked in one
call for each projection. The host launches few operations and waits for none, and nothing is computed of experts that
are not hit. On CPU [`few_rows`] is faster, since it copies no matrices.

Shape suffixes as in `experts/__init__.py`; N = T·K rows, in the order of the flattened `(T, K)` routing.
"""

import torch

from .frozen import FrozenExperts, LowRank, Projection, weighted_sum_


def run_row_by_row(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, experts: FrozenExperts, top_k_index_TK: torch.Tensor
) -> torch.Tensor:
    """What [`~ordmoe_peft.experts.frozen.run_frozen_experts`] computes, for few rows and not differentiable; the last
    argument is each token's experts (`torch.Tensor` of shape `(T, K)`)."""
    expert_N, top_k = top_k_index_TK.reshape(-1), top_k_index_TK.shape[1]
    with torch.autocast(x_TH.device.type, enabled=False), experts.at_hand():
        x_NH = x_TH.to(experts.up.dtype).unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)
        a_NF = experts.gate(_project(experts.up, x_NH, expert_N))
        y_NH = _project(experts.down, a_NF.to(experts.down.dtype), expert_N)
        if experts.norm is not None:
            y_NH = experts.norm(y_NH)
        return weighted_sum_(y_NH.view(*weights_TK.shape, -1), weights_TK).to(x_TH.dtype)


def _project(projection: Projection, x_NI: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
    """Each row times its expert's matrix, with bias and updates (`torch.Tensor` of shape `(N, O)`)."""
    x_N1I = x_NI.unsqueeze(1)
    y_N1O = torch.bmm(x_N1I, projection.open(all_scales=False)(expert_N))
    if projection.bias_EO is not None:
        y_N1O += projection.bias_EO[expert_N].unsqueeze(1)
    for lora in projection.lora:
        A_NRI, B_NRO = _factors(lora, expert_N, x_NI.dtype)
        y_N1O.baddbmm_(torch.bmm(x_N1I, A_NRI.transpose(1, 2)), B_NRO, alpha=lora.scaling)
    return y_N1O.squeeze(1)


def _factors(lora: LowRank, expert_N: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A (`torch.Tensor` of shape `(N, R, I)`) and B, transposed (`(N, R, O)`), of each row's expert."""
    column_NR = expert_N.unsqueeze(1) + lora.num_experts * torch.arange(lora.r, device=expert_N.device)
    B_OX = lora.B.index_select(1, column_NR.view(-1))
    return lora.A_ERI[expert_N].to(dtype), B_OX.t().view(*column_NR.shape, -1).to(dtype)
