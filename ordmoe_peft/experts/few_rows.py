"""Frozen experts with low-rank updates on few rows, as in decoding, without gradients.

There the time is that of reading the weights of the experts hit, and of every operation beside. So rows are put in the
order of their experts on the host, a base product is one `torch.mm` per expert, and LoRA takes two or three operations
for all rows: products with A row by row, or with A of all experts hit; then of B, a sum of R rows weighted by them.
Nothing is computed of the factors of experts that are not hit.

Shape suffixes as in `experts/__init__.py`.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn import functional as F

from .frozen import FrozenExperts, LowRank, Projection, weighted_sum_


# Rows up to which products with A are row by row: a gather of A for each, a product and a sum. That is fewer operations
# than a gather for each expert and a product with all of them. Measured on two CPU cores.
ROWS_BY_ROW = 24


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
    _columns: dict[tuple[int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def hit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts hit (`torch.Tensor` of shape `(P,)`), and each row's place among them (`(N,)`)."""
        return self.expert_N.unique_consecutive(return_inverse=True)

    def columns_of_B(self, num_experts: int, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where B of the experts hit is, for `F.embedding_bag`.

        Returns:
            Its columns in `(O, R·E)` (`torch.Tensor` of shape `(R·P,)`); of these, those of each row's expert
            (`(N·R,)`), and where each row's begin (`(N,)`).
        """
        if (num_experts, r) not in self._columns:
            (expert_P, place_N), r_R = self.hit, torch.arange(r, device=self.expert_N.device)
            column_RP = num_experts * r_R.unsqueeze(1) + expert_P
            picked_NR = place_N.unsqueeze(1) + len(expert_P) * r_R
            start_N = torch.arange(0, picked_NR.numel(), r, device=picked_NR.device)
            self._columns[num_experts, r] = column_RP.view(-1), picked_NR.view(-1), start_N
        return self._columns[num_experts, r]


def rows_by_expert(top_k_index_TK: torch.Tensor) -> RowsByExpert:
    """Order the rows of this routing (`torch.Tensor` of shape `(T, K)`)."""
    (num_tokens, top_k), expert_N = top_k_index_TK.shape, top_k_index_TK.reshape(-1)
    if num_tokens == 1 and len(num_rows := Counter(expert_N.tolist())) == top_k:  # an expert a row: any order will do
        row_N = torch.arange(top_k, device=expert_N.device)
        return RowsByExpert(num_rows, torch.zeros_like(row_N), expert_N, row_N)
    expert_N, order_N = torch.sort(expert_N)
    return RowsByExpert(Counter(expert_N.tolist()), order_N // top_k, expert_N, order_N.argsort())


def run_few_rows(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, experts: FrozenExperts, top_k_index_TK: torch.Tensor
) -> torch.Tensor:
    """What [`~ordmoe_peft.experts.frozen.run_frozen_experts`] computes, for few rows and not differentiable.

    Args:
        x_TH (`torch.Tensor` of shape `(T, H)`): tokens.
        weights_TK (`torch.Tensor` of shape `(T, K)`): routing weights.
        experts ([`~ordmoe_peft.experts.frozen.FrozenExperts`]): what to run.
        top_k_index_TK (`torch.Tensor` of shape `(T, K)`): each token's experts.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `x_TH`.
    """
    rows = rows_by_expert(top_k_index_TK)
    with torch.autocast(x_TH.device.type, enabled=False):
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
    """The frozen product of each row (`torch.Tensor` of shape `(N, O)`)."""
    products = _products if x_NI.dtype.itemsize < 4 else _products_from_the_left
    y_NO = products(projection, x_NI, rows)
    if projection.bias_EO is not None:
        y_NO += projection.bias_EO.index_select(0, rows.expert_N)
    return y_NO


def _products(projection: Projection, x_NI: torch.Tensor, rows: RowsByExpert) -> torch.Tensor:
    matrix, y_NO = projection.open(), x_NI.new_empty(len(x_NI), projection.out_features)
    sizes = [*rows.num_rows.values()]
    for expert, x_I, y_O in zip(rows.num_rows, x_NI.split(sizes), y_NO.split(sizes), strict=True):
        torch.mm(x_I, matrix(expert), out=y_O)
    return y_NO


def _products_from_the_left(projection: Projection, x_NI: torch.Tensor, rows: RowsByExpert) -> torch.Tensor:
    """The same with the matrix as the left factor: in 32 bits MKL then reads it up to three times as fast.

    One row alone would go another way there, so it is joined by the next, which is another expert's; that one's product
    then overwrites what this gives.
    """
    matrix, y_ON = projection.open(), x_NI.new_empty(projection.out_features, len(x_NI))
    start = 0
    for expert, num_rows in rows.num_rows.items():
        block = slice(start, start + max(num_rows, 2))
        torch.mm(matrix(expert).t(), x_NI[block].t(), out=y_ON[:, block])
        start += num_rows
    return y_ON.t().contiguous()


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
    column_X, picked_NR, start_N = rows.columns_of_B(lora.num_experts, lora.r)
    B_XO = lora.B.index_select(1, column_X).to(y_NO.dtype).t().contiguous()
    if lora.scaling != 1:
        x_NR *= lora.scaling
    y_NO += F.embedding_bag(picked_NR, B_XO, start_N, mode="sum", per_sample_weights=x_NR.view(-1))
