"""Multiply blocks of rows, each with its own expert's matrix, dense or low-rank, by operators that autograd knows.

These need no host sync, and are differentiable in the matrices, too. `ops/frozen_experts.py` is what to use where the
host knows the blocks and the matrices are frozen.

Shape suffixes as in `experts/__init__.py`.
"""

import torch
from torch.nn import functional as F


# Strides that `torch.nn.functional.grouped_mm` accepts are multiples of this many bytes, on CPU as on CUDA.
GROUPED_MM_ALIGNMENT = 16


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


def grouped_lora(
    x_NI: torch.Tensor,
    lora_A_ERI: torch.Tensor,
    lora_B_EOR: torch.Tensor,
    scaling: float,
    ends_E: torch.Tensor,
) -> torch.Tensor:
    """`scaling · x A_eᵀ B_eᵀ` for each row and its expert e (`torch.Tensor` of shape `(N, O)`).

    The factors meet the activations one after the other, so that no `(O, I)` delta ever exists.
    """
    # Rank is padded with zeros to what grouped_mm accepts; zeros add nothing to the product or its gradients.
    padding = -lora_A_ERI.shape[1] % (GROUPED_MM_ALIGNMENT // lora_A_ERI.element_size())
    if padding:
        lora_A_ERI, lora_B_EOR = F.pad(lora_A_ERI, (0, 0, 0, padding)), F.pad(lora_B_EOR, (0, padding))
    x_NR = grouped_matmul(x_NI, lora_A_ERI.transpose(1, 2), ends_E) * scaling
    return grouped_matmul(x_NR, lora_B_EOR.contiguous().transpose(1, 2), ends_E)
