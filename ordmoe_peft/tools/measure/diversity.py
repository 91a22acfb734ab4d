"""How different the experts of one tier are: the cosine between their outputs for the same token.

Shape suffixes as in `experts/__init__.py`.
"""

import torch
from torch import nn


def expert_outputs(experts: nn.Module, hidden_states_TH: torch.Tensor, top_k_index_TK: torch.Tensor) -> torch.Tensor:
    """What each of a token's K experts says on its own, unweighted (`torch.Tensor` of shape `(T, K, H)`).

    The experts are called as their block calls them, once for each of the K and with weight 1, so this holds for dense,
    4-bit and adapted experts alike.

    Args:
        experts (`nn.Module`): fused experts, or what wraps them.
        hidden_states_TH (`torch.Tensor` of shape `(T, H)`): tokens.
        top_k_index_TK (`torch.Tensor` of shape `(T, K)`): their experts.
    """
    one_T1 = hidden_states_TH.new_ones(len(hidden_states_TH), 1)
    indices = [index_T1.contiguous() for index_T1 in top_k_index_TK.split(1, dim=1)]
    return torch.stack([experts(hidden_states_TH, index_T1, one_T1) for index_T1 in indices], dim=1)


def mean_pairwise_cosine(outputs_TKH: torch.Tensor) -> float | None:
    """Mean over tokens and over pairs of different experts of the cosine between outputs; `None` for K = 1."""
    top_k = outputs_TKH.shape[1]
    if top_k < 2:
        return None
    units_TKH = nn.functional.normalize(outputs_TKH.float(), dim=-1)
    cosines_TKK = units_TKH @ units_TKH.transpose(1, 2)
    first, second = torch.triu_indices(top_k, top_k, offset=1)
    return cosines_TKK[:, first, second].mean().item()
