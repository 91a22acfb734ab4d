"""Rows of a collated batch: their prompts, and several batches in one, a row for each sample and tier."""

from dataclasses import dataclass
from typing import Any

import torch

from ...data.images import ENCODED, concatenated_images
from ...errors import OrdMoEDataError
from ...tiers.scope import IGNORED_LABEL, tiers_of_labels


@dataclass(frozen=True)
class SeparateRows:
    """A row for each sample and tier: the N samples under the first tier, then under the second, and so on.

    Args:
        inputs (`dict`): the model's inputs.
        tiers (`torch.Tensor` of shape `(G·N,)` or `(G·N, S)`): the tier of each row, or of each of its positions.
        num_samples (`int`): N.
    """

    inputs: dict[str, Any]
    tiers: torch.Tensor
    num_samples: int
    positions: None = None

    @property
    def first_mask(self) -> torch.Tensor:
        """Which inputs of the first tier's rows are no padding (`torch.Tensor` of shape `(N, S)`)."""
        # Padding-free rows have no mask, and no padding.
        mask = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        return mask[: self.num_samples]

    def as_separate_rows(self, outputs: Any) -> Any:
        """The model's outputs for these rows, as they are."""
        return outputs

    def first_group(self, values_TX: torch.Tensor) -> torch.Tensor:
        """Of values of all tokens, those of the first tier's rows."""
        return values_TX[: len(values_TX) * self.num_samples // len(self.inputs["labels"])]


def separate_rows(batches: list[dict[str, Any]], tiers: list[int], token_scope: str, pad_token_id: int) -> SeparateRows:
    """Rows of several tiers after one another.

    Args:
        batches (list of `dict`): for each tier its rows.
        tiers (list of `int`): the tier of each batch.
        token_scope (`str`): see [`~ordmoe_peft.tiers.scope`].
        pad_token_id (`int`): fills rows that are shorter than others.
    """
    rows, num_samples = stack_rows(batches, pad_token_id), len(batches[0]["labels"])
    row_tiers = torch.tensor(tiers).repeat_interleave(num_samples)
    return SeparateRows(rows, tiers_of_labels(row_tiers, rows["labels"], token_scope), num_samples)


def prompt_lengths(inputs: dict[str, Any]) -> torch.Tensor:
    """Number of prompt tokens of each row: those before its first label, or all where it has none (`(B,)`).

    Raises:
        [`OrdMoEDataError`]: a row's labels begin with its first token, so that nothing is left to respond to.
    """
    has_label_BS = inputs["labels"] != IGNORED_LABEL
    first_B = torch.where(has_label_BS.any(1), has_label_BS.int().argmax(1), inputs["attention_mask"].sum(1))
    if (first_B == 0).any():
        raise OrdMoEDataError(
            "Generated responses need prompts, but a row is a response from its first token on. Give `prompt` and "
            "`completion`, and leave completion_only_loss at its default."
        )
    return first_B


def left_padded_prompts(inputs: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """The prompts of right-padded rows as `generate` takes them; images stay as they are."""
    lengths_B = prompt_lengths(inputs)
    longest = int(lengths_B.max())
    column_BS = torch.arange(longest, device=lengths_B.device) - (longest - lengths_B).unsqueeze(1)
    is_prompt_BS = column_BS >= 0
    return {
        name: value.gather(1, column_BS.clamp(min=0)).where(is_prompt_BS, filler(name, pad_token_id))
        if is_per_token(value, inputs)
        else value
        for name, value in inputs.items()
        if name not in ("labels", "fused_lm_head")
    }


def stack_rows(batches: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Several batches' rows after one another, right-padded to the widest; images in the order of their rows."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    stacked = {
        name: torch.cat([_widened(name, batch[name], batch, width, pad_token_id) for batch in batches])
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batches[0].items()
    }
    encoded = [batch[ENCODED] for batch in batches if ENCODED in batch]
    return stacked | ({ENCODED: concatenated_images(encoded)} if encoded else {})


def _widened(name: str, value: torch.Tensor, batch: dict[str, Any], width: int, pad_token_id: int) -> torch.Tensor:
    if not is_per_token(value, batch) or value.shape[1] == width:
        return value
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=filler(name, pad_token_id))


def is_per_token(value: Any, inputs: dict[str, Any]) -> bool:
    """Whether one of the inputs has a value for each token, as `input_ids` has."""
    return isinstance(value, torch.Tensor) and value.shape == inputs["input_ids"].shape


def filler(name: str, pad_token_id: int) -> int:
    """What an input by that name holds where there is no token."""
    return {"input_ids": pad_token_id, "labels": IGNORED_LABEL}.get(name, 0)
