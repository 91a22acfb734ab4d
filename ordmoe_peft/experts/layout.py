"""Sort routed tokens by expert, so that each expert works on one contiguous block of rows."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn import functional as F


# In 16 bits on CPU, products are compiled for each shape that they meet (about 1 ms and 0.65 MB), so shapes are few: in
# bins, experts are counted in so many groups at most, and their slots in few sizes.
MOST_GROUPS = 16


@dataclass(frozen=True)
class ExpertGroups:
    """The order in which N = T·K routed rows are processed: all rows of expert 0, then of expert 1, and so on.

    Known on the device alone, without a host sync.

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


@dataclass(frozen=True)
class Part:
    """Some experts, whose slots lie side by side. Slots that hold no row are gaps.

    Args:
        slots (`slice`): its slots, of all slots.
        present (`slice`): its experts, of `ExpertSlots.expert_P`.
        bins (`list` of `(int, int)`): experts, and slots of each, for one bin after the other.
        experts (`list` of `int`): those that have rows. They come first.
        sizes (`list` of `int`): the slots to multiply and the slots to leave, for each expert in turn.
        gaps (`list` of `int`): the slots with a row and those without, for each expert in turn.
    """

    slots: slice
    present: slice
    bins: list[tuple[int, int]]
    experts: list[int]
    sizes: list[int]
    gaps: list[int]

    def by_bin(self, x_MI: torch.Tensor) -> list[torch.Tensor]:
        """A view of each bin's slots by expert (`torch.Tensor` of shape `(B, M / B, I)`)."""
        rows = x_MI.split([experts * slots for experts, slots in self.bins])
        return [x_I.view(*bin, x_MI.shape[-1]) for x_I, bin in zip(rows, self.bins, strict=True)]

    def factors_by_bin(self, factor_PRI: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A view of what each bin's experts have of a factor (`torch.Tensor` of shape `(B, R, I)`)."""
        return factor_PRI[self.present].split([experts for experts, _ in self.bins])

    def blocks(self, *tensors_MI: torch.Tensor) -> Iterable[tuple]:
        """Each of `experts` with views of its slots to multiply, one for each tensor of the part's slots."""
        return zip(self.experts, *(x_MI.split(self.sizes)[::2] for x_MI in tensors_MI), strict=False)

    def blank_gaps_(self, x_MI: torch.Tensor) -> None:
        """Write zeros where no row is."""
        for gap_I in x_MI.split(self.gaps)[1::2]:
            if len(gap_I):
                gap_I.zero_()


@dataclass(frozen=True)
class ExpertSlots:
    """Routed rows laid out by expert, part by part. The host knows the layout: one sync on CUDA.

    Args:
        slot_N (`torch.Tensor` of shape `(N,)`): the slot of each row, in the order of the flattened `(T, K)` routing.
        token_S (`torch.Tensor` of shape `(S,)`): the token in each slot; token 0 in gaps.
        expert_P (`torch.Tensor` of shape `(P,)`): the experts in the order of their slots.
        parts (`list` of [`Part`]): one after the other.
        top_k (`int`): K.
    """

    slot_N: torch.Tensor
    token_S: torch.Tensor
    expert_P: torch.Tensor
    parts: list[Part]
    top_k: int

    def rows(self, part: Part, x_TH: torch.Tensor) -> torch.Tensor:
        """The tokens in the slots of a part (`torch.Tensor` of shape `(M, H)`)."""
        return x_TH.index_select(0, self.token_S[part.slots])

    def by_token(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The rows of each token (`torch.Tensor` of shape `(T, K, I)`)."""
        return x_SI.index_select(0, self.slot_N).view(-1, self.top_k, x_SI.shape[-1])

    def sum_by_token(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The sum of each token's rows (`torch.Tensor` of shape `(T, I)`), without a copy of them all."""
        return F.embedding_bag(self.slot_N.view(-1, self.top_k), x_SI, mode="sum")

    def empty_for(self, num_experts: int, factor_PRI: torch.Tensor) -> torch.Tensor:
        """Room for what is like a factor of `expert_P`, as [`by_expert`] takes it: where some of `num_experts` are
        absent, one more, of zeros, stands for them."""
        num_present = len(self.expert_P)
        is_any_absent = num_present < num_experts
        x_PRI = factor_PRI.new_empty(num_present + is_any_absent, *factor_PRI.shape[1:])
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
    part_size: int = 2048,
) -> ExpertSlots:
    """Lay the routed rows of `top_k_index_TK` (`torch.Tensor` of shape `(T, K)`) out by expert.

    Args:
        num_experts (`int`): E.
        bin_cost (`int`, *optional*): what a bin costs, in slots. Experts with about as many rows share a bin, where
            each has as many slots, so that one batched product serves them; those with most rows come first. Without
            it experts keep their order, and there are no gaps.
        row_step (`int`, defaults to 1): with gaps, slots and blocks to multiply are multiples of it, where there are as
            many rows.
        part_size (`int`, defaults to 2048): the least slots of a part but the last: those that are worked on at a time.
    """
    expert_N, order_N = torch.sort(top_k_index_TK.reshape(-1))
    rows_E = torch.bincount(expert_N, minlength=num_experts).tolist()
    if bin_cost is None:
        experts = [expert for expert, rows in enumerate(rows_E) if rows]
        bins, row_step = [(1, rows_E[expert]) for expert in experts], 1
    else:
        experts = sorted(range(num_experts), key=lambda expert: -rows_E[expert])
        bins = into_bins([rows_E[expert] for expert in experts], bin_cost, row_step)
        experts = experts[: sum(present for present, _ in bins)]

    parts, first_slot_E, slot, start = [], [0] * num_experts, 0, 0
    for bins_of_part in into_parts(bins, part_size):
        sizes, gaps, hit, first_slot, first = [], [], [], slot, start
        for expert, slots in zip(experts[start:], [slots for n, slots in bins_of_part for _ in range(n)], strict=False):
            rows = rows_E[expert]
            block = min(whole_steps(rows, row_step), slots)
            sizes += [block, slots - block]
            gaps += [rows, slots - rows]
            hit += [expert] if rows else []
            first_slot_E[expert], slot, start = slot, slot + slots, start + 1
        parts.append(Part(slice(first_slot, slot), slice(first, start), bins_of_part, hit, sizes, gaps))

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=order_N.device)

    shift_E = [first - row for first, row in zip(first_slot_E, accumulate(rows_E, initial=0), strict=False)]
    row_N = torch.arange(len(order_N), device=order_N.device)
    sorted_slot_N = row_N + on_device(shift_E).index_select(0, expert_N)
    token_S = order_N.new_zeros(slot).index_copy_(0, sorted_slot_N, order_N // top_k_index_TK.shape[-1])
    return ExpertSlots(
        slot_N=torch.empty_like(order_N).index_copy_(0, order_N, sorted_slot_N),
        token_S=token_S,
        expert_P=on_device(experts),
        parts=parts,
        top_k=top_k_index_TK.shape[-1],
    )


def into_parts(bins: list[tuple[int, int]], part_size: int) -> list[list[tuple[int, int]]]:
    """Cut bins into parts of at least `part_size` slots, but the last."""
    parts, slots_of_part = [], part_size
    for experts, slots in bins:
        if slots_of_part >= part_size:
            parts.append([])
            slots_of_part = 0
        parts[-1].append((experts, slots))
        slots_of_part += experts * slots
    return parts


def into_bins(rows_E: list[int], bin_cost: int, row_step: int = 1) -> list[tuple[int, int]]:
    """Cut experts into bins: `(experts, slots of each)`, for one bin after the other.

    A bin takes in experts until it leaves more slots empty than a bin of their own costs.

    Args:
        rows_E (`list` of `int`): their rows, descending.
        bin_cost (`int`), row_step (`int`, defaults to 1): see [`lay_out_by_expert`].
    """
    group, bins, start = max(1, len(rows_E) // MOST_GROUPS), [], 0
    hit = len(rows_E) - rows_E.count(0)
    slots_P = [filled_up(rows, row_step) for rows in rows_E[: -(-hit // group) * group]]
    while start < hit:
        empty = accumulate(slots_P[start] - slots for slots in slots_P[start:])
        fitting = bisect_right(list(empty), bin_cost)
        present = fitting // group * group or 1 << fitting.bit_length() - 1
        bins.append((present, slots_P[start]))
        start += present
    return bins or [(1, 0)]


def filled_up(rows: int, row_step: int) -> int:
    """`rows`, or the next of few larger numbers: four between a power of two and the next."""
    return whole_steps(rows, max(row_step, 1 << max(0, (rows - 1).bit_length() - 3)))


def whole_steps(rows: int, row_step: int) -> int:
    """`rows`, or the next multiple of `row_step` where it is larger than that."""
    return rows if rows < row_step else -(-rows // row_step) * row_step
