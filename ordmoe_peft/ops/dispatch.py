"""Sort routed tokens by expert, so that each expert works on one contiguous block of rows."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertGroups:
    """The order in which N = T·K routed rows are processed: all rows of expert 0, then of expert 1, and so on.

    Args:
        order_N (`torch.Tensor` of shape `(N,)`): for each sorted row, its place in the flattened `(T, K)` routing.
        ends_E (`torch.Tensor` of shape `(E,)`, int32): where each expert's block ends; an expert without tokens ends
            where its predecessor does.
        top_k (`int`): K.
    """

    order_N: torch.Tensor
    ends_E: torch.Tensor
    top_k: int

    @property
    def token_N(self) -> torch.Tensor:
        """The token that each sorted row belongs to."""
        return self.order_N // self.top_k


def group_by_expert(top_k_index_TK: torch.Tensor, num_experts: int) -> ExpertGroups:
    """Group the routed rows of `top_k_index_TK` (`torch.Tensor` of shape `(T, K)`) by expert."""
    expert_N, order_N = torch.sort(top_k_index_TK.reshape(-1))
    # searchsorted rather than a histogram: it needs neither a float round trip on CPU nor a host sync on CUDA.
    experts_E = torch.arange(num_experts, device=expert_N.device, dtype=expert_N.dtype)
    ends_E = torch.searchsorted(expert_N, experts_E, right=True, out_int32=True)
    return ExpertGroups(order_N, ends_E, top_k_index_TK.shape[-1])


def combine_by_token(rows_NH: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
    """Undo the grouping and sum each token's K rows (`torch.Tensor` of shape `(N, H)` → `(T, H)`).

    A gather and a sum rather than `index_add_`, which is not deterministic on CUDA.
    """
    inverse_N = torch.empty_like(groups.order_N)
    inverse_N[groups.order_N] = torch.arange(len(groups.order_N), device=groups.order_N.device)
    return rows_NH[inverse_N].view(-1, groups.top_k, rows_NH.shape[-1]).sum(dim=1)
