"""Frozen experts with low-rank updates on few rows, as in decoding, without gradients. On CPU.

Here time goes into reading the weights of the experts hit, and into each further operation. Through `frozen.py` one
token in bf16 takes 1.98 times as long as the base, through this file 1.41 (README). Rows are put in the order of their
experts on the host, and a base product is one `torch.mm` per expert. LoRA takes two or three operations for all rows:
products with A, row by row or of all experts hit at once; then a sum of R columns of B, weighted by these products.
Nothing is computed of the factors of experts that are not hit.

Shape suffixes as in `experts/__init__.py`; P experts hit, in the order of rows.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn import functional as F

from .frozen import FrozenExperts, LowRank, Projection, weighted_sum_
from .tuning import ROWS_BY_ROW


@dataclass(frozen=True)
class RowsByExpert:
    """N = T·K routed rows, those of an expert side by side, known on the host.

    Args:
        num_rows (`dict` of `int` to `int`): each expert hit, in the order of rows, and how many it has.
        token_N, expert_N (`torch.Tensor` of shape `(N,)`): of each row.
        row_N (`torch.Tensor` of shape `(N,)`): the row of each place of the flattened `(T, K)` routing.
    """

    num_rows: dict[int, int]
    token_N: torch.Tensor
    expert_N: torch.Tensor
    row_N: torch.Tensor
    columns: dict[tuple[int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @cached_property
    def hit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts hit (`torch.Tensor` of shape `(P,)`), and each row's place among them (`(N,)`)."""
        return self.expert_N.unique_consecutive(return_inverse=True)

    def columns_of_B(self, num_experts: int, r: int) -> tuple[torch.Tensor, ...]:
        """Where B of the experts hit is, for `F.embedding_bag`; both projections ask for the same.

        Returns:
            Its columns in `(O, R·E)` (`torch.Tensor` of shape `(R·P,)`); of these, those of each row's expert
            (`(N, R)`).
        """
        if (num_experts, r) not in self.columns:
            (expert_P, place_N), r_R = self.hit, torch.arange(r, device=self.expert_N.device)
            column_RP = num_experts * r_R.unsqueeze(1) + expert_P
            self.columns[num_experts, r] = column_RP.view(-1), place_N.unsqueeze(1) + len(expert_P) * r_R
        return self.columns[num_experts, r]


def rows_by_expert(top_k_index_TK: torch.Tensor) -> RowsByExpert:
    """Order the rows of this routing (`torch.Tensor` of shape `(T, K)`)."""
    expert_N, order_N = torch.sort(top_k_index_TK.reshape(-1))
    token_N = order_N // top_k_index_TK.shape[-1]
    return RowsByExpert(Counter(expert_N.tolist()), token_N, expert_N, order_N.argsort())


def run_few_rows(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, experts: FrozenExperts, top_k_index_TK: torch.Tensor
) -> torch.Tensor:
    """What [`~ordmoe_peft.experts.frozen.run_frozen_experts`] computes, for few rows and not differentiable; the last
    argument is each token's experts (`torch.Tensor` of shape `(T, K)`)."""
    rows = rows_by_expert(top_k_index_TK)
    with torch.autocast(x_TH.device.type, enabled=False), experts.at_hand():
        x_in_dtype_TH = x_TH.to(experts.up.dtype)
        x_NH = x_in_dtype_TH.index_select(0, rows.token_N)
        up_NO = _base(experts.up, x_NH, rows)
        for lora in experts.up.lora:
            by_row = len(x_NH) <= ROWS_BY_ROW
            x_NR = _times_A(lora, x_NH, rows) if by_row else _tokens_times_A(lora, x_in_dtype_TH, rows)
            _add_from_A(lora, up_NO, x_NR, rows)
        a_NF = experts.gate(up_NO).to(experts.down.dtype)
        down_NH = _base(experts.down, a_NF, rows)
        for lora in experts.down.lora:
            _add_from_A(lora, down_NH, _times_A(lora, a_NF, rows), rows)
        y_NH = down_NH if experts.norm is None else experts.norm(down_NH)
        y_TKH = y_NH.index_select(0, rows.row_N).view(*weights_TK.shape, -1)
        return weighted_sum_(y_TKH, weights_TK).to(x_TH.dtype)


def _base(projection: Projection, x_NI: torch.Tensor, rows: RowsByExpert) -> torch.Tensor:
    """The frozen product of each row (`torch.Tensor` of shape `(N, O)`).

    In 32 bits with the matrix as the left factor: MKL then reads it up to three times as fast. One row alone would go
    another way there, so it is joined by the next, which is another expert's; that one's product then overwrites what
    this gives.
    """
    matrices, start, is_wide = projection.open(), 0, x_NI.dtype.itemsize >= 4
    shape = (len(x_NI), projection.out_features)
    y_NO = x_NI.new_empty(shape[::-1]).t() if is_wide else x_NI.new_empty(shape)
    for expert, num_rows in rows.num_rows.items():
        matrix_IO = matrices(slice(expert, expert + 1))[0]
        if is_wide:
            block = slice(start, start + max(num_rows, 2))
            torch.mm(matrix_IO.t(), x_NI[block].t(), out=y_NO.t()[:, block])
        else:
            block = slice(start, start + num_rows)
            torch.mm(x_NI[block], matrix_IO, out=y_NO[block])
        start += num_rows
    y_NO = y_NO.contiguous()
    return y_NO if projection.bias_EO is None else y_NO.add_(projection.bias_EO.index_select(0, rows.expert_N))


def _times_A(lora: LowRank, x_NI: torch.Tensor, rows: RowsByExpert) -> torch.Tensor:
    """Each row's `x Aᵀ` (`torch.Tensor` of shape `(N, R)`)."""
    A_NRI = lora.A_ERI.index_select(0, rows.expert_N).to(x_NI.dtype)
    return (x_NI.unsqueeze(1) * A_NRI).sum(-1)


def _tokens_times_A(lora: LowRank, x_TI: torch.Tensor, rows: RowsByExpert) -> torch.Tensor:
    """The same from the tokens that rows share, through A of all experts hit."""
    expert_P, place_N = rows.hit
    A_PRI = lora.A_ERI.index_select(0, expert_P).to(x_TI.dtype)
    x_TPR = F.linear(x_TI, A_PRI.view(-1, x_TI.shape[1]))
    return x_TPR.view(-1, lora.r).index_select(0, torch.add(place_N, rows.token_N, alpha=len(expert_P)))


def _add_from_A(lora: LowRank, y_NO: torch.Tensor, x_NR: torch.Tensor, rows: RowsByExpert) -> None:
    """Add to each row `x_NR` times its expert's B, scaled: a weighted sum of R columns of B."""
    column_X, picked_NR = rows.columns_of_B(lora.num_experts, lora.r)
    B_XO = lora.B.index_select(1, column_X).to(y_NO.dtype).t().contiguous()
    if lora.scaling != 1:
        x_NR *= lora.scaling
    y_NO += F.embedding_bag(picked_NR, B_XO, mode="sum", per_sample_weights=x_NR)
