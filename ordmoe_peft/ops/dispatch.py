"""Sort routed tokens by expert, so that each expert works on one contiguous block of rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch.nn import functional as F


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
class ExpertTiles:
    """Routed rows laid out by expert, each expert's block filled up to whole tiles of `tile` rows.

    Tiles let one batched product serve all experts, whatever their numbers of rows. The host knows the layout: one sync
    on CUDA. Slots that hold no row are gaps.

    Args:
        slot_N (`torch.Tensor` of shape `(N,)`): the slot of each row, in the order of the flattened `(T, K)` routing.
        token_S (`torch.Tensor` of shape `(S,)`): the token in each slot; token 0 in gaps.
        expert_P (`torch.Tensor` of shape `(P,)`): the expert of each tile; S = P · `tile`.
        experts (`list` of `int`): the experts that have rows.
        sizes (`list` of `int`): the slots to multiply and the slots to leave, for each of `experts` in turn.
        gaps (`list` of `int`): the slots with a row and those without, for each of `experts` in turn.
        tile (`int`): slots per tile.
        top_k (`int`): K.
    """

    slot_N: torch.Tensor
    token_S: torch.Tensor
    expert_P: torch.Tensor
    experts: list[int]
    sizes: list[int]
    gaps: list[int]
    tile: int
    top_k: int

    def rows(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each slot's token (`torch.Tensor` of shape `(S, H)`)."""
        return x_TH.index_select(0, self.token_S)

    def tiles(self, x_SI: torch.Tensor) -> torch.Tensor:
        """A view by tile (`torch.Tensor` of shape `(P, tile, I)`)."""
        return x_SI.view(len(self.expert_P), self.tile, x_SI.shape[-1])

    def blocks(self, *tensors_SI: torch.Tensor) -> Iterable[tuple]:
        """Each of `experts` with views of its slots to multiply, one for each tensor."""
        return zip(self.experts, *(x_SI.split(self.sizes)[::2] for x_SI in tensors_SI), strict=True)

    def blank_gaps_(self, x_SI: torch.Tensor) -> torch.Tensor:
        """Write zeros where no row is."""
        if len(x_SI) > len(self.slot_N):
            for gap_I in x_SI.split(self.gaps)[1::2]:
                gap_I.zero_()
        return x_SI

    def are_experts(self, num_experts: int) -> bool:
        """Whether tile e is expert e's and there is one for each."""
        return len(self.expert_P) == len(self.experts) == num_experts

    def of_slots(self, x_EI: torch.Tensor) -> torch.Tensor:
        """What belongs to each slot's expert (`torch.Tensor` of shape `(S, I)`)."""
        return x_EI.index_select(0, self.expert_P.repeat_interleave(self.tile))

    def by_token(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The rows of each token (`torch.Tensor` of shape `(T, K, I)`)."""
        return x_SI.index_select(0, self.slot_N).view(-1, self.top_k, x_SI.shape[-1])

    def sum_by_token(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The sum of each token's rows (`torch.Tensor` of shape `(T, I)`), without a copy of them all."""
        return F.embedding_bag(self.slot_N.view(-1, self.top_k), x_SI, mode="sum")

    def sum_by_expert(self, x_PRI: torch.Tensor, num_experts: int, r_first: bool = False) -> torch.Tensor:
        """The sum over each expert's tiles, added up in 32 bits; 0 without tiles.

        Args:
            x_PRI (`torch.Tensor` of shape `(P, R, I)`): what the tiles hold.
            num_experts (`int`): E.
            r_first (`bool`, defaults to `False`): return `(R, E, I)` rather than `(E, R, I)`.
        """
        _, r, width = x_PRI.shape
        if self.are_experts(num_experts) and not r_first:
            return x_PRI
        # One sum over rows of `width` for each r and expert, or of r · `width` for each expert.
        first_tile_E = torch.searchsorted(self.expert_P, torch.arange(num_experts, device=x_PRI.device))
        tile_P, num_tiles = torch.arange(len(x_PRI), device=x_PRI.device), len(x_PRI)
        if not r_first:
            sums = F.embedding_bag(tile_P, x_PRI.reshape(num_tiles, r * width), first_tile_E, mode="sum")
            return sums.view(num_experts, r, width)
        r_R1 = torch.arange(r, device=x_PRI.device).unsqueeze(1)
        row_RP, first_RE = r * tile_P + r_R1, first_tile_E + num_tiles * r_R1
        sums = F.embedding_bag(row_RP.view(-1), x_PRI.reshape(-1, width), first_RE.view(-1), mode="sum")
        return sums.view(r, num_experts, width)


def lay_out_by_expert(top_k_index_TK: torch.Tensor, tile_cost: int = 0, row_step: int = 1) -> ExpertTiles:
    """Lay the routed rows of `top_k_index_TK` (`torch.Tensor` of shape `(T, K)`) out by expert.

    Args:
        tile_cost (`int`, defaults to 0): what a tile costs beside its rows, in rows; 0 leaves no gaps.
        row_step (`int`, defaults to 1): from so many rows on, tiles and blocks to multiply are multiples of it, where
            there are gaps.
    """
    expert_N, order_N = torch.sort(top_k_index_TK.reshape(-1))
    rows_of = {expert: rows for expert, rows in enumerate(torch.bincount(expert_N).tolist()) if rows}
    tile = best_tile(list(rows_of.values()), tile_cost, row_step)
    tiles_of = {expert: -(-rows // tile) for expert, rows in rows_of.items()}
    sizes, gaps, shifts, slot, row = [], [], [], 0, 0
    for expert, rows in rows_of.items():
        shifts.append(slot - row)
        slots = tiles_of[expert] * tile
        block = min(whole_steps(rows, row_step), slots)
        sizes += [block, slots - block]
        gaps += [rows, slots - rows]
        slot, row = slot + slots, row + rows

    def on_device(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor([*values], dtype=torch.long, device=order_N.device)

    row_N = torch.arange(len(order_N), device=order_N.device)
    sorted_slot_N = row_N + on_device(shifts).repeat_interleave(on_device(rows_of.values()))
    token_S = order_N.new_zeros(slot).index_copy_(0, sorted_slot_N, order_N // top_k_index_TK.shape[-1])
    return ExpertTiles(
        slot_N=torch.empty_like(order_N).index_copy_(0, order_N, sorted_slot_N),
        token_S=token_S,
        expert_P=on_device(chain.from_iterable(repeat(expert, tiles) for expert, tiles in tiles_of.items())),
        experts=[*rows_of],
        sizes=sizes,
        gaps=gaps,
        tile=tile,
        top_k=top_k_index_TK.shape[-1],
    )


def best_tile(rows_of_experts: list[int], tile_cost: int, row_step: int = 1) -> int:
    """The rows per tile at which tiles cost least: their slots, gaps included, and `tile_cost` for each tile.

    Few large tiles have many gaps where experts' numbers of rows differ; many small ones repeat each expert's factors.
    """
    if tile_cost == 0:
        return 1
    largest = max(rows_of_experts, default=1)
    sizes = {whole_steps(-(-largest // 2**halvings), row_step) for halvings in range(largest.bit_length() + 1)}
    return min(sizes, key=lambda tile: (tile + tile_cost) * sum(-(-rows // tile) for rows in rows_of_experts))


def whole_steps(rows: int, row_step: int) -> int:
    """`rows`, or the next multiple of `row_step` where it is larger than that."""
    return rows if rows < row_step else -(-rows // row_step) * row_step
