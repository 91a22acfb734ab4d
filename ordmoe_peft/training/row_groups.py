"""The rows of a micro-batch: once for each tier that needs them, with the response that the tier is ranked on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.generation import generate_by_tier, with_responses
from ..data.rows import check_room, num_positions
from ..tiers.plan import RandomDraw
from .arguments import OrdMoETrainingArguments
from .row_layout.separate import left_padded_prompts
from .tier_scores import SFT_ROWS


# TRL's head that computes log-probabilities without keeping logits, as TRL calls it.
FUSED_HEAD = {"use_cache": False, "fused_lm_head": True}


@dataclass(frozen=True)
class RowGroup:
    """A batch of rows: the tier whose response they hold, the tier that routes them, and the model's inputs."""

    tier: int
    routed_by: int
    inputs: dict[str, Any]


def row_groups(
    inputs: dict[str, Any], tiers: Sequence[int], generated: Sequence[dict[str, Any]] | None, scored_by: str
) -> list[RowGroup]:
    """A micro-batch's rows, once for each tier that has a gradient; first those for supervised fine-tuning.

    Args:
        inputs (`dict`): the collated batch.
        tiers (sequence of `int`): tiers that the objective has a gradient for.
        generated (list of `dict`, *optional*): for each of `tiers` the batch's prompts with what it generated, as rows;
            by default all tiers score the batch's own responses.
        scored_by (`str`): `"tier"`, each generated response under the tier that generated it, or `"policy"`, tier 1.
    """
    inputs = inputs | FUSED_HEAD
    if generated is None:
        return [RowGroup(tier, tier, inputs) for tier in (1, *(tier for tier in tiers if tier != 1))]
    shared = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    return [RowGroup(SFT_ROWS, 1, inputs)] + [
        RowGroup(tier, tier if scored_by == "tier" else 1, shared | rows)
        for tier, rows in zip(tiers, generated, strict=True)
    ]


def generated_rows(
    model: nn.Module,
    inputs: dict[str, Any],
    tiers: Sequence[int],
    args: OrdMoETrainingArguments,
    *,
    end_ids: torch.Tensor,
    pad_token_id: int,
    draw: RandomDraw,
    index: int,
) -> list[dict[str, Any]]:
    """A micro-batch's prompts with what each of `tiers` generates for them, as rows.

    Drawn from the seed, its step and the `index` of the micro-batch in it, so the same when the step is run again.
    """
    prompts = left_padded_prompts(inputs, pad_token_id)
    check_room(prompts["input_ids"].shape[1], args.sampling.get("max_new_tokens") or 0, num_positions(model.config))
    drawn_from = (args.seed, model.training, draw.step, index)
    generated = generate_by_tier(
        model,
        prompts,
        tiers,
        seed=random.Random(str(drawn_from)).getrandbits(63),
        end_ids=end_ids,
        pad_token_id=pad_token_id,
        rows_per_call=args.generation_batch_size,
        routing={"draw": draw},
        **args.sampling,
    )
    responses = zip(generated.ids_CBS, generated.mask_CBS, strict=True)
    return [with_responses(prompts, *response) for response in responses]
