"""Grouped products, dense or low-rank, by operators that autograd knows, and the order of rows that they take.

These are differentiable in the matrices, too. Where `grouped_mm` is one kernel, the host waits for nothing. Elsewhere
it is a loop over the experts, which waits for their sizes ([`~ordmoe_peft.experts.tuning.has_grouped_kernel`]), and
`frozen.py` is what to use if the matrices are frozen.

Shape suffixes as in `experts/__init__.py`.
"""

import torch
from torch.nn import functional as F

from .frozen import LowRank


# Strides that `torch.nn.functional.grouped_mm` accepts are multiples of this many bytes, on CPU as on CUDA.
GROUPED_MM_ALIGNMENT = 16


def combine_by_token(rows_NH: torch.Tensor, order_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Undo the grouping and sum each token's K rows (`torch.Tensor` of shape `(N, H)` → `(T, H)`).

    A gather and a sum rather than `index_add_`, which is not deterministic on CUDA.
    """
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return rows_NH[inverse_N].view(-1, top_k, rows_NH.shape[-1]).sum(dim=1)


def grouped_matmul(x_NI: torch.Tensor, weight_EIO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """`x[block of e] @ weight[e]` for each expert e (`torch.Tensor` of shape `(N, O)`), differentiable in both.

    Uses `torch.nn.functional.grouped_mm` where sizes meet its alignment rule, else one product per expert, which costs
    a host sync on CUDA.
    """
    sizes = weight_EIO.shape[1:]
    if all(size * weight_EIO.element_size() % GROUPED_MM_ALIGNMENT == 0 for size in sizes):
        return F.grouped_mm(x_NI, weight_EIO, offs=ends_E)
    starts_and_ends = zip([0, *ends_E.tolist()], ends_E.tolist(), strict=False)
    blocks = [
        x_NI[start:end] @ weight_EIO[expert] for expert, (start, end) in enumerate(starts_and_ends) if end > start
    ]
    return torch.cat(blocks) if blocks else x_NI.new_zeros(0, sizes[1])


def grouped_lora(x_NI: torch.Tensor, update: LowRank, ends_E: torch.Tensor) -> torch.Tensor:
    """`scaling · x A_eᵀ B_eᵀ` for each row and its expert e (`torch.Tensor` of shape `(N, O)`).

    The factors meet the activations one after the other, so that no `(O, I)` delta ever exists.
    """
    A_ERI, B_EOR = update.A_ERI.to(x_NI.dtype), update.B_EOR.to(x_NI.dtype)
    # Rank is padded with zeros to what grouped_mm accepts; zeros add nothing to the product or its gradients.
    padding = -update.r % (GROUPED_MM_ALIGNMENT // A_ERI.element_size())
    if padding:
        A_ERI, B_EOR = F.pad(A_ERI, (0, 0, 0, padding)), F.pad(B_EOR, (0, padding))
    x_NR = grouped_matmul(x_NI, A_ERI.transpose(1, 2), ends_E) * update.scaling
    return grouped_matmul(x_NR, B_EOR.contiguous().transpose(1, 2), ends_E)
