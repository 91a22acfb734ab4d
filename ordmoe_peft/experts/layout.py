"""Routed rows laid out by expert on the host, so that each expert works on one contiguous block.

Rows lie in slots. Experts with about as many rows share a bin, where each has as many slots, so that one batched
product serves the whole bin; experts with most rows come first. Slots without a row are gaps, which read zeros. Bins
that follow each other form a chunk, the slots that are worked on at a time.

    expert     5      2      0      7    3    8   1           r: a row, .: a gap
    slots    [rrrr] [rrr.] [rrr.] [rr] [r.] [r.] [r] ...
    bins     `---- 3 of 4 -----'  `--- 3 of 2 --' `- ...
    blocks   `----------' `----'  `--------' `--' `- ...      here two experts at a time
    chunks   `------------- chunk 0 ------------' `- chunk 1 ...

A product with LoRA's factors runs over a bin. A product with the experts' own matrices runs over a block: the experts
of a bin whose matrices exist at a time. Where that is one expert, its rows alone are multiplied, rounded up so that few
sizes occur.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch.nn import functional as F

from .tuning import MAX_BIN_COUNTS


Bin = tuple[int, int]  # how many experts, and the slots of each
Experts: TypeAlias = "slice | torch.Tensor"  # which experts: neighbours, or indices of shape (C,)


@dataclass(frozen=True)
class Block:
    """Experts of one bin, whose own matrices exist at a time.

    Args:
        experts (`slice` or `torch.Tensor` of shape `(C,)`): which.
        count (`int`): C.
        slots (`int`), rest (`int`): the slots to multiply, and those after them that are left out.
    """

    experts: Experts
    count: int
    slots: int
    rest: int


@dataclass(frozen=True)
class ExpertChunk:
    """Some experts, whose slots lie side by side.

    Args:
        slots (`slice`): its slots, of all slots.
        present (`slice`): its experts, of `PaddedLayout.expert_P`.
        bins (`list` of `(int, int)`): experts, and slots of each, for one bin after the other.
        blocks (`list` of [`Block`]): one after the other.
    """

    slots: slice
    present: slice
    bins: list[Bin]
    blocks: list[Block]

    def by_bin(self, x_MI: torch.Tensor) -> list[torch.Tensor]:
        """A view of each bin's slots by expert (`torch.Tensor` of shape `(B, M / B, I)`)."""
        rows = x_MI.split([experts * slots for experts, slots in self.bins])
        return [x_I.view(*bin, x_MI.shape[-1]) for x_I, bin in zip(rows, self.bins, strict=True)]

    def factors_by_bin(self, factor_PRI: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A view of what each bin's experts have of a factor (`torch.Tensor` of shape `(B, R, I)`)."""
        return factor_PRI[self.present].split([experts for experts, _ in self.bins])

    def by_block(self, *tensors_MI: torch.Tensor) -> Iterator[tuple]:
        """The experts of each block that has rows, with a view of the slots to multiply of each tensor
        (`torch.Tensor` of shape `(C, M / C, I)`)."""
        splits = [x_MI.split(self._sizes)[::2] for x_MI in tensors_MI]
        for block, *parts in zip(self.blocks, *splits, strict=True):
            if block.slots:
                yield block.experts, *(x_I.view(block.count, -1, x_I.shape[-1]) for x_I in parts)

    def zero_rest_(self, x_MI: torch.Tensor) -> None:
        """Write zeros into slots that no block multiplies: memory there is uninitialised and may hold NaN, and
        NaN · 0 is NaN."""
        for rest in self._rests:
            x_MI[rest].zero_()

    @cached_property
    def _sizes(self) -> list[int]:
        return [size for block in self.blocks for size in (block.slots, block.rest)]

    @cached_property
    def _rests(self) -> list[slice]:
        ends = accumulate(self._sizes)
        return [slice(end - size, end) for size, end in list(zip(self._sizes, ends, strict=True))[1::2] if size]


@dataclass(frozen=True)
class PaddedLayout:
    """Routed rows laid out by expert, chunk by chunk. The host knows the layout: one sync on CUDA.

    Args:
        slot_N (`torch.Tensor` of shape `(N,)`): the slot of each row, in the order of the flattened `(T, K)` routing.
        token_S (`torch.Tensor` of shape `(S,)`): the token in each slot; in gaps T, where [`with_gap`] has zeros.
        expert_P (`torch.Tensor` of shape `(P,)`): the experts in the order of their slots.
        chunks (`list` of [`ExpertChunk`]): one after the other.
        top_k (`int`): K.
    """

    slot_N: torch.Tensor
    token_S: torch.Tensor
    expert_P: torch.Tensor
    chunks: list[ExpertChunk]
    top_k: int

    def rows(self, chunk: ExpertChunk, x_GH: torch.Tensor) -> torch.Tensor:
        """The tokens in the slots of a chunk (`torch.Tensor` of shape `(M, H)`), from what [`with_gap`] gives."""
        return x_GH.index_select(0, self.token_S[chunk.slots])

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


def with_gap(x_TH: torch.Tensor) -> torch.Tensor:
    """The tokens and a row of zeros, which is what gaps read (`torch.Tensor` of shape `(T + 1, H)`). Another token's
    row would do on paper, but in 16 bits it may overflow in experts that it does not go to."""
    return F.pad(x_TH, (0, 0, 0, 1))


def lay_out_by_expert(
    top_k_index_TK: torch.Tensor,
    num_experts: int,
    bin_cost: int | None = None,
    row_step: int = 1,
    chunk_size: int = 2048,
    block_experts: int | None = None,
) -> PaddedLayout:
    """Lay the routed rows of `top_k_index_TK` (`torch.Tensor` of shape `(T, K)`) out by expert.

    Args:
        num_experts (`int`): E.
        bin_cost (`int`, *optional*): what a bin costs, in slots. Without it experts keep their order, each is a bin,
            and there are no gaps.
        row_step (`int`, defaults to 1): with gaps, slots and blocks to multiply are multiples of it, where there are as
            many rows.
        chunk_size (`int`, defaults to 2048): the least slots of a chunk but the last.
        block_experts (`int`, *optional*): the most experts of a block, whose slots are all multiplied. Without it a
            block is one expert, whose rows alone are, rounded up to `row_step`.
    """
    order_N, expert_N, ends_E = group_by_expert(top_k_index_TK, num_experts)
    ends = ends_E.tolist()
    rows_E = [end - start for start, end in pairwise([0, *ends])]
    if bin_cost is None:
        experts = [expert for expert, rows in enumerate(rows_E) if rows]
        bins, row_step = [(1, rows_E[expert]) for expert in experts], 1
    else:
        experts = sorted(range(num_experts), key=lambda expert: -rows_E[expert])
        bins = bin_experts([rows_E[expert] for expert in experts], bin_cost, row_step, block_experts is None)
        experts = in_order_within_bins(experts, bins)
    first_slots = list(accumulate((slots for count, slots in bins for _ in range(count)), initial=0))
    shift_E = [0] * num_experts
    for expert, slot in zip(experts, first_slots, strict=False):
        shift_E[expert] = slot - (ends[expert] - rows_E[expert])
    on_device = upload([*shift_E, *experts], order_N.device)
    shift_E, expert_P = on_device.split([num_experts, len(experts)])

    chunks: list[ExpertChunk] = []
    place = 0
    for bins_of_chunk in split_bins(bins, chunk_size):
        first, blocks = place, []
        for count, slots in bins_of_chunk:
            rows = [rows_E[expert] for expert in experts[place : place + count]]
            for sizes in cut_into_blocks(count, slots, rows, row_step, block_experts):
                places = slice(place, place + sizes[0])
                blocks.append(Block(neighbours(experts[places]) or expert_P[places], *sizes))
                place = places.stop
        of_all = slice(first_slots[first], first_slots[place])
        chunks.append(ExpertChunk(of_all, slice(first, place), bins_of_chunk, blocks))

    num_tokens, top_k = top_k_index_TK.shape
    sorted_slot_N = torch.arange(len(order_N), device=order_N.device) + shift_E.index_select(0, expert_N)
    gap_S = order_N.new_full((first_slots[-1],), num_tokens)
    return PaddedLayout(
        slot_N=torch.empty_like(order_N).index_copy_(0, order_N, sorted_slot_N),
        token_S=gap_S.index_copy_(0, sorted_slot_N, order_N // top_k),
        expert_P=expert_P,
        chunks=chunks,
        top_k=top_k,
    )


def neighbours(experts: list[int]) -> slice | None:
    """The slice that takes these experts, if they follow each other."""
    is_slice = experts[-1] - experts[0] == len(experts) - 1
    return slice(experts[0], experts[-1] + 1) if is_slice else None


def group_by_expert(top_k_index_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order the N = T·K routed rows of `top_k_index_TK` (`torch.Tensor` of shape `(T, K)`) by expert.

    Known on the device alone, without a host sync.

    Returns:
        For each sorted row its place in the flattened routing and its expert (`torch.Tensor` of shape `(N,)`), and
        where each expert's block of rows ends (`(E,)`, int32); an expert without tokens ends where its predecessor
        does.
    """
    expert_N, order_N = torch.sort(top_k_index_TK.reshape(-1))
    # searchsorted rather than a histogram: it needs neither a float round trip on CPU nor a host sync on CUDA.
    experts_E = torch.arange(num_experts, device=expert_N.device, dtype=expert_N.dtype)
    return order_N, expert_N, torch.searchsorted(expert_N, experts_E, right=True, out_int32=True)


def upload(values: list[int], device: torch.device) -> torch.Tensor:
    """`values` on `device` (`torch.Tensor` of dtype int64). From pinned memory, so that the host does not wait."""
    on_host = torch.tensor(values, dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def in_order_within_bins(experts: list[int], bins: list[Bin]) -> list[int]:
    """The experts of `bins`, sorted within each: the matrices of neighbours need not be gathered."""
    firsts = accumulate((count for count, _ in bins), initial=0)
    by_bin = (experts[first : first + count] for first, (count, _) in zip(firsts, bins, strict=False))
    return [expert for of_bin in by_bin for expert in sorted(of_bin)]


def cut_into_blocks(count: int, slots: int, rows: list[int], row_step: int, most: int | None) -> list[tuple[int, ...]]:
    """Cut a bin into blocks: `count`, `slots` and `rest` of [`Block`], for one after the other.

    Args:
        count (`int`), slots (`int`): the bin.
        rows (`list` of `int`): of its experts.
        row_step (`int`), most (`int`, *optional*): see [`lay_out_by_expert`], where `most` is `block_experts`.
    """
    if most is None:
        multiplied = (min(round_up(own, row_step), slots) for own in rows)
        return [(1, own, slots - own) for own in multiplied]
    counts = (min(most, count - first) for first in range(0, count, most))
    return [(count, count * slots, 0) for count in counts]


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


def bin_experts(rows_P: list[int], bin_cost: int, row_step: int = 1, few_shapes: bool = True) -> list[Bin]:
    """Cut experts into bins: `(experts, slots of each)`, for one bin after the other.

    A bin takes in experts until it leaves more slots empty than a bin of their own costs.

    Args:
        rows_P (`list` of `int`): their rows, descending.
        bin_cost (`int`), row_step (`int`, defaults to 1): see [`lay_out_by_expert`].
        few_shapes (`bool`, defaults to `True`): let bins have few counts of experts and of slots.
    """
    num_hit = len(rows_P) - rows_P.count(0)
    group = max(1, len(rows_P) // MAX_BIN_COUNTS) if few_shapes else 1
    slots_of = slots_for if few_shapes else round_up
    slots_P = [slots_of(rows, row_step) for rows in rows_P[: -(-num_hit // group) * group]]
    bins, start = [], 0
    while start < num_hit:
        empty = accumulate(slots_P[start] - slots for slots in slots_P[start:])
        count = bisect_right(list(empty), bin_cost)
        if few_shapes:  # whole groups of experts, or a power of two
            count = count // group * group or 1 << count.bit_length() - 1
        bins.append((count, slots_P[start]))
        start += count
    return bins or [(1, 0)]


def slots_for(rows: int, row_step: int) -> int:
    """`rows`, or the next of few larger numbers: four between a power of two and the next."""
    return round_up(rows, max(row_step, 1 << max(0, (rows - 1).bit_length() - 3)))


def round_up(rows: int, step: int) -> int:
    """`rows`, or the next multiple of `step` where it is larger than that."""
    return rows if rows < step else -(-rows // step) * step
