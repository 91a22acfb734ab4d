"""A prompt computed once for several tiers: one row holds it and each tier's response.

Under `token_scope="response"` prompts are on tier 1 whatever the tier of the response. So the rows of the first tier
run as they are, and each further tier adds a branch to each row: those positions of its own row that depend on its
tier, from the last prompt token to the last response token but one. A branch sees the prompt and itself, at the
positions that it has in a row of its own.

    row of tier 1    p0 p1 p2 r1 r2        packed      p0 p1 p2 r1 r2 p2 r1
    row of tier 3    p0 p1 p2 r1 r2        predicts    -  -  r1 r2 -  r1 r2

Only tensors here; `prompt_sharing.py` says which models this is right for. Locals: N samples, G tiers, S columns of a
packed row, W positions of a separate row that predict a token.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from ...data.responses import IGNORED_LABEL
from ...tiers.scope import tiers_of_labels
from .separate import filler, is_per_token


# Segments of a packed row: padding, what every branch sees, and from here on one for each tier.
PADDING, SHARED, FIRST_TIER = -1, 0, 1


@dataclass
class PackedRows:
    """Rows that share their prompts, and the way back to separate rows.

    Args:
        inputs (`dict`): inputs of the packed rows, with `position_ids`, and with `shift_labels`, the token that each
            position predicts, in place of labels. A mask is still to be added, see [`branch_mask`].
        tiers_NS (`torch.Tensor` of shape `(N, S)`): the tier of each position.
        places_NS (`torch.Tensor` of shape `(N, S)`): its column in the row that it is from; −1 for padding.
        segments_NS (`torch.Tensor` of shape `(N, S)`): −1 for padding, 0 for the shared prompt, g for the g-th tier.
        columns_NS (`torch.Tensor` of shape `(N, S)`): the column it would have in the first tier's row.
        index_GNW (`torch.Tensor` of shape `(G, N, W)`): for each position of each tier's separate rows but the last,
            its column in the packed row; −1 where it has none.
        first_width (`int`): columns of the first tier's rows.
    """

    inputs: dict[str, Any]
    tiers_NS: torch.Tensor
    places_NS: torch.Tensor
    segments_NS: torch.Tensor
    columns_NS: torch.Tensor
    index_GNW: torch.Tensor
    first_width: int

    def as_separate_rows(self, outputs: Any) -> Any:
        """The packed rows' outputs with each per-token field as separate rows have it: `(G·N, W)` from `(N, S)`."""
        parts = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
        return type(outputs)(
            **{name: self._unpacked(part) for name, part in parts.items() if _has_shape(part, self.tiers_NS)}
        )

    def _unpacked(self, value_NS: torch.Tensor) -> torch.Tensor:
        index_GNW = self.index_GNW.to(value_NS.device)
        value_GNS = value_NS.expand(len(index_GNW), *value_NS.shape)
        return value_GNS.gather(2, index_GNW.clamp(min=0)).masked_fill(index_GNW < 0, 0).flatten(0, 1)

    def first_tier(self, values_TX: torch.Tensor) -> torch.Tensor:
        """Of values of all tokens, those of the first tier's rows; anything where these have padding."""
        values_NSX = values_TX.view(*self.tiers_NS.shape, -1)
        return values_NSX[:, : self.first_width].flatten(0, 1)


@dataclass
class _Piece:
    """What a packed row takes of one tier's row: `length` columns from `start` on, put at `offset`; each `(N,)`."""

    start: torch.Tensor
    length: torch.Tensor
    offset: torch.Tensor

    @property
    def end(self) -> torch.Tensor:
        return self.offset + self.length


def pack_rows(
    batches: list[dict[str, Any]], tiers: list[int], position_ids: torch.Tensor, pad_token_id: int
) -> PackedRows:
    """Rows of several tiers with the same prompts, as one row each.

    Args:
        batches (list of `dict`): for each tier its N rows, with `input_ids`, `attention_mask` and `labels`. Responses
            and padding may differ; images are those of the first.
        tiers (list of `int`): the tier of each batch.
        position_ids (`torch.Tensor` of shape `(N, S)` or `(3, N, S)`): positions in the first batch's rows.
        pad_token_id (`int`): fills rows that are shorter than others.
    """
    first, device = batches[0], batches[0]["labels"].device
    labels = [batch["labels"] for batch in batches]
    predicts = [_next_tokens(labels_NS) != IGNORED_LABEL for labels_NS in labels]
    is_token_NS = first["attention_mask"].bool()
    prompt_end_N = torch.where(predicts[0].any(1), _first(predicts[0]), _end(is_token_NS) - 1)
    prompt_end_N1 = prompt_end_N.clamp(min=0).unsqueeze(1)
    pieces = _pieces(is_token_NS, predicts)
    gather = _Gather(pieces, [labels_NS.shape[1] for labels_NS in labels])

    per_token = [name for name, value in first.items() if is_per_token(value, first)]
    own_columns = [torch.arange(labels_NS.shape[1], device=device).expand_as(labels_NS) for labels_NS in labels]
    columns = [own_columns[0]]  # in the first tier's rows
    segments = [torch.where(own_columns[0] < prompt_end_N1, SHARED, FIRST_TIER).masked_fill(~is_token_NS, PADDING)]
    for place, (piece, own_NS) in enumerate(zip(pieces[1:], own_columns[1:], strict=True), start=FIRST_TIER + 1):
        columns.append(own_NS - piece.start.unsqueeze(1) + prompt_end_N1)
        segments.append(torch.full_like(own_NS, place))
    columns_NS, segments_NS = gather(columns, 0), gather(segments, PADDING)
    tiers_of_rows = [
        tiers_of_labels(torch.full((len(labels_NS),), tier), labels_NS, "response").to(device)
        for tier, labels_NS in zip(tiers, labels, strict=True)
    ]
    inputs = {name: value for name, value in first.items() if name not in per_token}
    for name in sorted({*per_token} - {"labels", "attention_mask", "position_ids"}):
        inputs[name] = gather([batch[name] for batch in batches], filler(name, pad_token_id))
    inputs["shift_labels"] = gather([_next_tokens(labels_NS) for labels_NS in labels], IGNORED_LABEL)
    inputs["position_ids"] = _positions(
        position_ids, columns_NS, torch.where(segments_NS > FIRST_TIER, prompt_end_N1, columns_NS)
    )
    return PackedRows(
        inputs,
        tiers_NS=gather(tiers_of_rows, 1),
        places_NS=gather(own_columns, 0).masked_fill(segments_NS == PADDING, -1),
        segments_NS=segments_NS,
        columns_NS=columns_NS,
        index_GNW=_columns_of_separate_rows(pieces, max(len(labels_NS[0]) for labels_NS in labels) - 1),
        first_width=is_token_NS.shape[1],
    )


def branch_mask(packed: PackedRows, window: int | None = None) -> torch.Tensor:
    """Which tokens each token of packed rows sees (`torch.Tensor` of shape `(N, 1, S, S)`, bool).

    Args:
        packed ([`PackedRows`]): the rows.
        window (`int`, *optional*): tokens that sliding attention reaches back, its own included; counted along the
            branch.
    """
    segments_NS, columns_NS = packed.segments_NS, packed.columns_NS
    key_N1S, query_NS1 = segments_NS.unsqueeze(1), segments_NS.unsqueeze(2)
    sees_NSS = ((key_N1S == SHARED) | (key_N1S == query_NS1)).tril()
    if window is not None:
        sees_NSS = sees_NSS & (columns_NS.unsqueeze(2) - columns_NS.unsqueeze(1) < window)
    return sees_NSS.unsqueeze(1)


class _Gather:
    """Puts values of all tiers' separate rows where the packed rows have them."""

    def __init__(self, pieces: list[_Piece], widths: list[int]):
        # At least as wide as the first tier's rows, of which router logits are taken.
        column_S = torch.arange(max(int(pieces[-1].end.max()), widths[0]), device=pieces[0].start.device)
        self.source_NS = torch.full((len(pieces[0].start), len(column_S)), -1, device=column_S.device)
        before = 0  # columns of the rows of earlier tiers, when all are put side by side
        for piece, width in zip(pieces, widths, strict=True):
            is_inside_NS = (column_S >= piece.offset.unsqueeze(1)) & (column_S < piece.end.unsqueeze(1))
            source_NS = before + (piece.start - piece.offset).unsqueeze(1) + column_S
            self.source_NS = torch.where(is_inside_NS, source_NS, self.source_NS)
            before += width

    def __call__(self, values: list[torch.Tensor], fill: int) -> torch.Tensor:
        value_NS = torch.cat(values, 1).gather(1, self.source_NS.clamp(min=0))
        return value_NS.masked_fill(self.source_NS < 0, fill)


def _pieces(is_token_NS: torch.Tensor, predicts: list[torch.Tensor]) -> list[_Piece]:
    """The first tier's rows as they are, and of the others what predicts their responses."""
    none_N = torch.zeros_like(_end(is_token_NS))
    pieces = [_Piece(none_N, _end(is_token_NS), none_N)]
    for predicts_NS in predicts[1:]:
        start_N = _first(predicts_NS)
        pieces.append(_Piece(start_N, _end(predicts_NS) - start_N, pieces[-1].end))
    return pieces


def _columns_of_separate_rows(pieces: list[_Piece], width: int) -> torch.Tensor:
    column_W = torch.arange(width, device=pieces[0].start.device)
    index = []
    for piece in pieces:
        step_NW = column_W - piece.start.unsqueeze(1)
        is_inside_NW = (step_NW >= 0) & (step_NW < piece.length.unsqueeze(1))
        index.append(torch.where(is_inside_NW, piece.offset.unsqueeze(1) + step_NW, -1))
    return torch.stack(index)


def _positions(position_ids: torch.Tensor, columns_NS: torch.Tensor, anchor_NS: torch.Tensor) -> torch.Tensor:
    """Position ids at columns of the first tier's rows, counted on from `anchor_NS` where these may have ended."""
    anchor = anchor_NS.expand(*position_ids.shape[:-1], -1)
    return position_ids.gather(-1, anchor) + columns_NS - anchor_NS


def _next_tokens(labels_NS: torch.Tensor) -> torch.Tensor:
    """The label that each position predicts."""
    return torch.nn.functional.pad(labels_NS[:, 1:], (0, 1), value=IGNORED_LABEL)


def _first(holds_NS: torch.Tensor) -> torch.Tensor:
    """The first column that holds in each row; 0 where there is none."""
    return holds_NS.int().argmax(1)


def _end(holds_NS: torch.Tensor) -> torch.Tensor:
    """The column after the last that holds in each row; 0 where there is none."""
    count_S = torch.arange(1, holds_NS.shape[1] + 1, device=holds_NS.device)
    return (holds_NS * count_S).amax(1)


def _has_shape(value: Any, like: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == like.shape
