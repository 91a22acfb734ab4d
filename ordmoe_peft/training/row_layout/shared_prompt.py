"""A prompt computed once for several tiers: one row holds it and each tier's response.

Under `token_scope="response"` prompts are on tier 1 whatever the tier of the response. So the rows of the first tier
run as they are, and each further tier adds a branch to each row: those positions of its own row that depend on its
tier, from the last prompt token to the last response token but one. A branch sees the prompt and itself, at the
positions that it has in a row of its own.

    row of tier 1    p0 p1 p2 r1 r2        shared      p0 p1 p2 r1 r2 p2 r1
    row of tier 3    p0 p1 p2 r1 r2        predicts    -  -  r1 r2 -  r1 r2

Only tensors here; `prompt_sharing.py` says which models this is right for. Locals: N samples, G tiers, S columns of a
row with a shared prompt, W positions of a separate row that predict a token.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import pad

from ...tiers.scope import IGNORED_LABEL, tiers_of_labels
from .separate import filler, is_per_token


# Segments of a shared-prompt row: padding, what every branch sees, and from here on one for each tier.
PADDING, SHARED, FIRST_TIER = -1, 0, 1


@dataclass
class SharedPromptRows:
    """Rows that share their prompts, and the way back to separate rows.

    Args:
        inputs (`dict`): the model's inputs, with `position_ids`, and with `shift_labels`, the token that each position
            predicts, in place of labels. A mask is still to be added, see [`branch_mask`].
        tiers (`torch.Tensor` of shape `(N, S)`): the tier of each position.
        positions (`torch.Tensor` of shape `(N, S)`): its column in the row that it is from; −1 for padding.
        segments_NS (`torch.Tensor` of shape `(N, S)`): −1 for padding, 0 for the shared prompt, g for the g-th tier.
        columns_NS (`torch.Tensor` of shape `(N, S)`): the column it would have in the first tier's row.
        index_GNW (`torch.Tensor` of shape `(G, N, W)`): for each position of each tier's separate rows but the last,
            its column in the shared-prompt row; −1 where it has none.
        first_mask (`torch.Tensor` of shape `(N, S')`): the attention mask of the first tier's own rows.
    """

    inputs: dict[str, Any]
    tiers: torch.Tensor
    positions: torch.Tensor
    segments_NS: torch.Tensor
    columns_NS: torch.Tensor
    index_GNW: torch.Tensor
    first_mask: torch.Tensor
    num_samples: None = None

    def as_separate_rows(self, outputs: Any) -> Any:
        """The model's outputs with each per-token field as separate rows have it: `(G·N, W)` from `(N, S)`."""
        parts = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
        return type(outputs)(
            **{name: self._of_separate_rows(part) for name, part in parts.items() if _has_shape(part, self.tiers)}
        )

    def _of_separate_rows(self, value_NS: torch.Tensor) -> torch.Tensor:
        index_GNW = self.index_GNW.to(value_NS.device)
        value_GNS = value_NS.expand(len(index_GNW), *value_NS.shape)
        return value_GNS.gather(2, index_GNW.clamp(min=0)).masked_fill(index_GNW < 0, 0).flatten(0, 1)

    def first_group(self, values_TX: torch.Tensor) -> torch.Tensor:
        """Of values of all tokens, those of the first tier's rows; anything where these have padding."""
        values_NSX = values_TX.view(*self.tiers.shape, -1)
        return values_NSX[:, : self.first_mask.shape[1]].flatten(0, 1)


def shared_prompt_rows(
    batches: list[dict[str, Any]], tiers: list[int], position_ids: torch.Tensor, pad_token_id: int
) -> SharedPromptRows:
    """Rows of several tiers with the same prompts, as one row each.

    Args:
        batches (list of `dict`): for each tier its N rows, with `input_ids`, `attention_mask` and `labels`. Responses
            and padding may differ; images are those of the first.
        tiers (list of `int`): the tier of each batch.
        position_ids (`torch.Tensor` of shape `(N, S)` or `(3, N, S)`): positions in the first batch's rows.
        pad_token_id (`int`): fills rows that are shorter than others.
    """
    first = batches[0]
    labels = [batch["labels"] for batch in batches]
    predicts = [_next_tokens(labels_NS) != IGNORED_LABEL for labels_NS in labels]
    columns = [torch.arange(labels_NS.shape[1], device=labels_NS.device).expand_as(labels_NS) for labels_NS in labels]
    is_token_NS = first["attention_mask"].bool()
    prompt_end_N1 = torch.where(predicts[0].any(1), _first(predicts[0]), _end(is_token_NS) - 1).clamp(min=0)[:, None]
    starts = [torch.zeros_like(prompt_end_N1), *(_first(predicts_NS)[:, None] for predicts_NS in predicts[1:])]
    ends = [_end(is_token_NS)[:, None], *(_end(predicts_NS)[:, None] for predicts_NS in predicts[1:])]
    join = _Join([(own >= start) & (own < end) for own, start, end in zip(columns, starts, ends, strict=True)])

    segments = [torch.where(columns[0] < prompt_end_N1, SHARED, FIRST_TIER).masked_fill(~is_token_NS, PADDING)]
    segments += [torch.full_like(own, index) for index, own in enumerate(columns[1:], start=FIRST_TIER + 1)]
    in_first_row = [
        columns[0],
        *(own - start + prompt_end_N1 for own, start in zip(columns[1:], starts[1:], strict=True)),
    ]
    columns_NS, segments_NS = join(in_first_row, 0), join(segments, PADDING)
    tiers_of_rows = [
        tiers_of_labels(torch.full((len(labels_NS),), tier), labels_NS, "response").to(labels_NS.device)
        for tier, labels_NS in zip(tiers, labels, strict=True)
    ]
    per_token = {name for name, value in first.items() if is_per_token(value, first)}
    inputs = {name: value for name, value in first.items() if name not in per_token}
    for name in sorted(per_token - {"labels", "attention_mask", "position_ids"}):
        inputs[name] = join([batch[name] for batch in batches], filler(name, pad_token_id))
    inputs["shift_labels"] = join([_next_tokens(labels_NS) for labels_NS in labels], IGNORED_LABEL)
    anchor_NS = torch.where(segments_NS > FIRST_TIER, prompt_end_N1, columns_NS)
    inputs["position_ids"] = _positions(position_ids, columns_NS, anchor_NS)
    return SharedPromptRows(
        inputs,
        tiers=join(tiers_of_rows, 1),
        positions=join(columns, 0).masked_fill(segments_NS == PADDING, -1),
        segments_NS=segments_NS,
        columns_NS=columns_NS,
        index_GNW=join.columns_of_separate_rows(max(labels_NS.shape[1] for labels_NS in labels) - 1),
        first_mask=first["attention_mask"],
    )


def branch_mask(shared: SharedPromptRows, window: int | None = None) -> torch.Tensor:
    """Which tokens each token of shared-prompt rows sees (`torch.Tensor` of shape `(N, 1, S, S)`, bool).

    Args:
        shared ([`SharedPromptRows`]): the rows.
        window (`int`, *optional*): tokens that sliding attention reaches back, its own included; counted along the
            branch.
    """
    segments_NS, columns_NS = shared.segments_NS, shared.columns_NS
    key_N1S, query_NS1 = segments_NS.unsqueeze(1), segments_NS.unsqueeze(2)
    sees_NSS = ((key_N1S == SHARED) | (key_N1S == query_NS1)).tril()
    if window is not None:
        sees_NSS = sees_NSS & (columns_NS.unsqueeze(2) - columns_NS.unsqueeze(1) < window)
    return sees_NSS.unsqueeze(1)


class _Join:
    """Keeps some columns of all tiers' separate rows, put side by side, and closes the gaps between them.

        side by side    p0 p1 p2 r1 r2 p0 p1 p2 r1 r2
        kept             x  x  x  x  x  -  -  x  x  -
        joined          p0 p1 p2 r1 r2 p2 r1

    Args:
        keep (list of `torch.Tensor`): for each tier which columns of its rows are kept.
    """

    def __init__(self, keep: list[torch.Tensor]):
        self.keep_NX, self.widths = torch.cat(keep, 1), [keep_NS.shape[1] for keep_NS in keep]
        # At least as wide as the first tier's rows, of which router logits are taken.
        width = max(int(self.keep_NX.sum(1).max()), self.widths[0])
        self.source_NS = self.keep_NX.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        self.is_kept_NS = self.keep_NX.gather(1, self.source_NS)

    def __call__(self, values: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.cat(values, 1).gather(1, self.source_NS).masked_fill(~self.is_kept_NS, fill)

    def columns_of_separate_rows(self, width: int) -> torch.Tensor:
        """For the first `width` columns of each tier's rows their joined column, −1 where they are not kept."""
        column_NX = (self.keep_NX.cumsum(1) - 1).masked_fill(~self.keep_NX, -1)
        by_tier = column_NX.split(self.widths, 1)
        return torch.stack([pad(column_NS, (0, width - column_NS.shape[1]), value=-1) for column_NS in by_tier])


def _positions(position_ids: torch.Tensor, columns_NS: torch.Tensor, anchor_NS: torch.Tensor) -> torch.Tensor:
    """Position ids at columns of the first tier's rows, counted on from `anchor_NS` where these may have ended."""
    anchor = anchor_NS.expand(*position_ids.shape[:-1], -1)
    return position_ids.gather(-1, anchor) + columns_NS - anchor_NS


def _next_tokens(labels_NS: torch.Tensor) -> torch.Tensor:
    """The label that each position predicts."""
    return pad(labels_NS[:, 1:], (0, 1), value=IGNORED_LABEL)


def _first(holds_NS: torch.Tensor) -> torch.Tensor:
    """The first column that holds in each row; 0 where there is none."""
    return holds_NS.int().argmax(1)


def _end(holds_NS: torch.Tensor) -> torch.Tensor:
    """The column after the last that holds in each row; 0 where there is none."""
    count_S = torch.arange(1, holds_NS.shape[1] + 1, device=holds_NS.device)
    return (holds_NS * count_S).amax(1)


def _has_shape(value: Any, like: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == like.shape
