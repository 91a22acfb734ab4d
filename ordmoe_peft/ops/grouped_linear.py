"""Multiply blocks of rows, each with its own expert's matrix: dense, packed in 4 bits, or low-rank.

Shape suffixes as in `ops/__init__.py`.
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F


# Strides that `torch.nn.functional.grouped_mm` accepts are multiples of this many bytes, on CPU as on CUDA.
GROUPED_MM_ALIGNMENT = 16


def segments(ends_E: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, start, end) for each expert that has rows. Costs one host sync on CUDA."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


def grouped_matmul(x_NI: torch.Tensor, weight_EIO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """`x[block of e] @ weight[e]` for each expert e (`torch.Tensor` of shape `(N, O)`), differentiable in both.

    Uses `torch.nn.functional.grouped_mm` where sizes meet its alignment rule, else one product per expert.
    """
    sizes = weight_EIO.shape[1:]
    if all(size * weight_EIO.element_size() % GROUPED_MM_ALIGNMENT == 0 for size in sizes):
        return F.grouped_mm(x_NI, weight_EIO, offs=ends_E)
    blocks = [x_NI[start:end] @ weight_EIO[expert] for expert, start, end in segments(ends_E)]
    return torch.cat(blocks) if blocks else x_NI.new_zeros(0, sizes[1])


class _PackedMatmul(torch.autograd.Function):
    """Product with frozen matrices that exist only while they are used; backward unpacks them a second time.

    Keeping the unpacked matrices for backward would hold the dense model in memory, which 4-bit storage is to avoid.
    """

    @staticmethod
    def forward(ctx, x_NI, ends_E, unpack: Callable[[int], torch.Tensor], out_features: int):
        ctx.unpack, ctx.in_features = unpack, x_NI.shape[-1]
        ctx.save_for_backward(ends_E)
        y_NO = x_NI.new_empty(len(x_NI), out_features)
        for expert, start, end in segments(ends_E):
            torch.mm(x_NI[start:end], unpack(expert), out=y_NO[start:end])
        return y_NO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO):
        (ends_E,) = ctx.saved_tensors
        grad_NI = grad_NO.new_empty(len(grad_NO), ctx.in_features)
        for expert, start, end in segments(ends_E):
            torch.mm(grad_NO[start:end], ctx.unpack(expert).T, out=grad_NI[start:end])
        return grad_NI, None, None, None


def packed_grouped_matmul(
    x_NI: torch.Tensor, unpack: Callable[[int], torch.Tensor], out_features: int, ends_E: torch.Tensor
) -> torch.Tensor:
    """[`grouped_matmul`] with frozen matrices that `unpack(e)` produces one at a time, only for experts with rows.

    Args:
        x_NI (`torch.Tensor` of shape `(N, I)`): rows, grouped by expert, in the dtype of the unpacked matrices.
        unpack (`Callable`): expert → `torch.Tensor` of shape `(I, O)`.
        out_features (`int`): O.
        ends_E (`torch.Tensor` of shape `(E,)`): where each expert's block of rows ends.
    """
    return _PackedMatmul.apply(x_NI, ends_E, unpack, out_features)


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
    lora_A_ERI, lora_B_EOR = F.pad(lora_A_ERI, (0, 0, 0, padding)), F.pad(lora_B_EOR, (0, padding)).contiguous()
    x_NR = grouped_matmul(x_NI, lora_A_ERI.transpose(1, 2), ends_E)
    return grouped_matmul(x_NR, lora_B_EOR.transpose(1, 2), ends_E) * scaling
