"""Routed rows laid out by expert on the host, so that each expert works on one contiguous block.

Rows lie in slots. Experts with about as many rows share a bin, where each has as many slots, so that one batched
product serves the whole bin; experts with most rows come first. Slots without a row are gaps. Bins that follow each
other form a chunk, the slots that are worked on at a time.

    expert     5      2      0      7    3    8   1           r: a row, .: a gap
    slots    [rrrr] [rrr.] [rrr.] [rr] [r.] [r.] [r] ...
    bins     `---- 3 of 4 -----'  `--- 3 of 2 --' `- ...
    chunks   `------------- chunk 0 ------------' `- chunk 1 ...

A batched product runs over all slots of a bin. A product with an expert's own matrix runs over its block: its rows,
rounded up so that few sizes occur.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.nn import functional as F

from .tuning import MAX_BIN_COUNTS


Bin = tuple[int, int]  # how many experts, and the slots of each


@dataclass(frozen=True)
class ExpertChunk:
    """Some experts, whose slots lie side by side.

    Args:
        slots (`slice`): its slots, of all slots.
        present (`slice`): its experts, of `PaddedLayout.expert_P`.
        bins (`list` of `(int, int)`): experts, and slots of each, for one bin after the other.
        experts (`list` of `int`): those that have rows. They come first.
        block_sizes (`list` of `int`): the slots to multiply and the slots to leave, for each expert in turn.
        gaps (`list` of `slice`): the chunk's slots without a row.
    """

    slots: slice
    present: slice
    bins: list[Bin]
    experts: list[int]
    block_sizes: list[int]
    gaps: list[slice]

    def by_bin(self, x_MI: torch.Tensor) -> list[torch.Tensor]:
        """A view of each bin's slots by expert (`torch.Tensor` of shape `(B, M / B, I)`)."""
        rows = x_MI.split([experts * slots for experts, slots in self.bins])
        return [x_I.view(*bin, x_MI.shape[-1]) for x_I, bin in zip(rows, self.bins, strict=True)]

    def factors_by_bin(self, factor_PRI: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A view of what each bin's experts have of a factor (`torch.Tensor` of shape `(B, R, I)`)."""
        return factor_PRI[self.present].split([experts for experts, _ in self.bins])

    def blocks(self, *tensors_MI: torch.Tensor) -> Iterable[tuple]:
        """Each of `experts` with views of its slots to multiply, one for each tensor of the chunk's slots."""
        return zip(self.experts, *(x_MI.split(self.block_sizes)[::2] for x_MI in tensors_MI), strict=False)

    def zero_gaps_(self, x_MI: torch.Tensor) -> None:
        """Write zeros where no row is: memory there is uninitialised and may hold NaN, and NaN · 0 is NaN."""
        for gap in self.gaps:
            x_MI[gap].zero_()


@dataclass(frozen=True)
class PaddedLayout:
    """Routed rows laid out by expert, chunk by chunk. The host knows the layout: one sync on CUDA.

    Args:
        slot_N (`torch.Tensor` of shape `(N,)`): the slot of each row, in the order of the flattened `(T, K)` routing.
        token_S (`torch.Tensor` of shape `(S,)`): the token in each slot; token 0 in gaps.
        expert_P (`torch.Tensor` of shape `(P,)`): the experts in the order of their slots.
        chunks (`list` of [`ExpertChunk`]): one after the other.
        top_k (`int`): K.
    """

    slot_N: torch.Tensor
    token_S: torch.Tensor
    expert_P: torch.Tensor
    chunks: list[ExpertChunk]
    top_k: int

    def rows(self, chunk: ExpertChunk, x_TH: torch.Tensor) -> torch.Tensor:
        """The tokens in the slots of a chunk (`torch.Tensor` of shape `(M, H)`)."""
        return x_TH.index_select(0, self.token_S[chunk.slots])

    def by_token(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The rows of each token (`torch.Tensor` of shape `(T, K, I)`)."""
        return x_SI.index_select(0, self.slot_N).view(-1, self.top_k, x_SI.shape[-1])

    def sum_by_token(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The sum of each token's rows (`torch.Tensor` of shape `(T, I)`), without a copy of them all."""
        return F.embedding_bag(self.slot_N.view(-1, self.top_k), x_SI, mode="sum")

    def empty_for(self, num_experts: int, factor_PRI: torch.Tensor) -> torch.Tensor:
        """Memory for something like a factor of the experts in `expert_P`, as [`by_expert`] takes it. Where some of
        `num_experts` are absent, it has one more matrix, of zeros, which stands for them."""
        is_any_absent = len(self.expert_P) < num_experts
        x_PRI = factor_PRI.new_empty(len(self.expert_P) + is_any_absent, *factor_PRI.shape[1:])
        if is_any_absent:
            x_PRI[-1] = 0
        return x_PRI

    def by_expert(self, x_PRI: torch.Tensor, num_experts: int, r_first: bool = False) -> torch.Tensor:
        """What belongs to `expert_P` in the order of all experts, with 0 for the others.

        Args:
            x_PRI (`torch.Tensor` of shape `(P, R, I)` or `(P + 1, R, I)`): what to arrange, see [`empty_for`].
            num_experts (`int`): E.
            r_first (`bool`, defaults to `False`): return `(R, E, I)` rather than `(E, R, I)`.
        """
        num_places, r, width = x_PRI.shape
        # A gather, which runs on all cores, where index_copy_ runs on one.
        place_E = self.expert_P.new_full((num_experts,), num_places - 1)
        place_E[self.expert_P] = torch.arange(len(self.expert_P), device=place_E.device)
        if not r_first:
            return x_PRI.view(num_places, r * width).index_select(0, place_E).view(num_experts, r, width)
        row_RE = r * place_E + torch.arange(r, device=place_E.device).unsqueeze(1)
        return x_PRI.view(-1, width).index_select(0, row_RE.view(-1)).view(r, num_experts, width)


def lay_out_by_expert(
    top_k_index_TK: torch.Tensor,
    num_experts: int,
    bin_cost: int | None = None,
    row_step: int = 1,
    chunk_size: int = 2048,
) -> PaddedLayout:
    """Lay the routed rows of `top_k_index_TK` (`torch.Tensor` of shape `(T, K)`) out by expert.

    Args:
        num_experts (`int`): E.
        bin_cost (`int`, *optional*): what a bin costs, in slots. Without it experts keep their order, each is a bin,
            and there are no gaps.
        row_step (`int`, defaults to 1): with gaps, slots and blocks to multiply are multiples of it, where there are as
            many rows.
        chunk_size (`int`, defaults to 2048): the least slots of a chunk but the last.
    """
    expert_N, order_N = torch.sort(top_k_index_TK.reshape(-1))
    rows_E = torch.bincount(expert_N, minlength=num_experts).tolist()
    if bin_cost is None:
        experts = [expert for expert, rows in enumerate(rows_E) if rows]
        bins, row_step = [(1, rows_E[expert]) for expert in experts], 1
    else:
        experts = sorted(range(num_experts), key=lambda expert: -rows_E[expert])
        bins = bin_experts([rows_E[expert] for expert in experts], bin_cost, row_step)
        experts = experts[: sum(count for count, _ in bins)]
    chunks: list[ExpertChunk] = []
    first_slot_E = [0] * num_experts
    slot = place = 0
    for bins_of_chunk in split_bins(bins, chunk_size):
        chunk = ExpertChunk(slice(slot, slot), slice(place, place), bins_of_chunk, [], [], [])
        for slots in (slots for count, slots in bins_of_chunk for _ in range(count)):
            expert, start = experts[place], slot - chunk.slots.start
            rows = rows_E[expert]
            block = min(round_up(rows, row_step), slots)
            chunk.block_sizes.extend((block, slots - block))
            if rows:
                chunk.experts.append(expert)
            if rows < slots:
                chunk.gaps.append(slice(start + rows, start + slots))
            first_slot_E[expert], slot, place = slot, slot + slots, place + 1
        chunks.append(replace(chunk, slots=slice(chunk.slots.start, slot), present=slice(chunk.present.start, place)))

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=order_N.device)

    top_k = top_k_index_TK.shape[-1]
    shift_E = [first - row for first, row in zip(first_slot_E, accumulate(rows_E, initial=0), strict=False)]
    sorted_slot_N = torch.arange(len(order_N), device=order_N.device) + on_device(shift_E).index_select(0, expert_N)
    return PaddedLayout(
        slot_N=torch.empty_like(order_N).index_copy_(0, order_N, sorted_slot_N),
        token_S=order_N.new_zeros(slot).index_copy_(0, sorted_slot_N, order_N // top_k),
        expert_P=on_device(experts),
        chunks=chunks,
        top_k=top_k,
    )


def split_bins(bins: list[Bin], chunk_size: int) -> list[list[Bin]]:
    """Cut bins into chunks of at least `chunk_size` slots, but the last."""
    chunks: list[list[Bin]] = []
    slots_of_chunk = chunk_size
    for count, slots in bins:
        if slots_of_chunk >= chunk_size:
            chunks.append([])
            slots_of_chunk = 0
        chunks[-1].append((count, slots))
        slots_of_chunk += count * slots
    return chunks


def bin_experts(rows_P: list[int], bin_cost: int, row_step: int = 1) -> list[Bin]:
    """Cut experts into bins: `(experts, slots of each)`, for one bin after the other.

    A bin takes in experts until it leaves more slots empty than a bin of their own costs.

    Args:
        rows_P (`list` of `int`): their rows, descending.
        bin_cost (`int`), row_step (`int`, defaults to 1): see [`lay_out_by_expert`].
    """
    group = max(1, len(rows_P) // MAX_BIN_COUNTS)
    num_hit = len(rows_P) - rows_P.count(0)
    slots_P = [slots_for(rows, row_step) for rows in rows_P[: -(-num_hit // group) * group]]
    bins, start = [], 0
    while start < num_hit:
        empty = accumulate(slots_P[start] - slots for slots in slots_P[start:])
        fitting = bisect_right(list(empty), bin_cost)
        # Few counts of experts: whole groups of them, or a power of two.
        count = fitting // group * group or 1 << fitting.bit_length() - 1
        bins.append((count, slots_P[start]))
        start += count
    return bins or [(1, 0)]


def slots_for(rows: int, row_step: int) -> int:
    """`rows`, or the next of few larger numbers: four between a power of two and the next."""
    return round_up(rows, max(row_step, 1 << max(0, (rows - 1).bit_length() - 3)))


def round_up(rows: int, step: int) -> int:
    """`rows`, or the next multiple of `step` where it is larger than that."""
    return rows if rows < step else -(-rows // step) * step
