"""One forward for all tiers: the batch repeated once per tier, as rows."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..generation import repeat_rows
from ..tiers.records import recorded_router_logits
from ..tiers.routing import tier_routing


@dataclass
class TierScores:
    """What a tier pass says of a batch.

    Args:
        log_probs_CBS (`torch.Tensor` of shape `(C, B, S)`): log-probability of each label under each tier, 0 where
            there is none.
        mask_BS (`torch.Tensor` of shape `(B, S)`): where there is a label.
        router_logits (`list` of `torch.Tensor` of shape `(B·S', E)`): tier 1's, per MoE layer, over all S' inputs.
    """

    log_probs_CBS: torch.Tensor
    mask_BS: torch.Tensor
    router_logits: list[torch.Tensor]


class TierPasses:
    """Stands in for the model in `SFTTrainer.compute_loss`: runs the batch under all tiers, answers with tier 1's rows.

    So the loss and the metrics of supervised fine-tuning stay TRL's own, of tier 1, from the same forward. What the
    other tiers gave is left in `scores`.

    Args:
        model (`Callable`): the model as the trainer wraps it.
        moe_model (`nn.Module`): the model whose routers are held to tiers.
        num_tiers (`int`): C.
        step (`int`): what `random` grouping draws from.
        records_routing (`bool`): whether tier 1's router logits are needed.
    """

    def __init__(self, model: Callable, moe_model: nn.Module, num_tiers: int, step: int, records_routing: bool):
        self.model, self.moe_model = model, moe_model
        self.num_tiers, self.step, self.records_routing = num_tiers, step, records_routing
        self.scores: TierScores | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        batch_size = len(inputs["labels"])
        rows = repeat_rows(inputs, self.num_tiers)
        tiers = torch.arange(1, self.num_tiers + 1).repeat_interleave(batch_size)
        with (
            tier_routing(self.moe_model, tiers, step=self.step, num_samples=batch_size),
            recorded_router_logits(self.moe_model, enabled=self.records_routing) as router_logits,
        ):
            outputs = self.model(**rows)
        self.scores = TierScores(
            log_probs_CBS=outputs.log_probs.view(self.num_tiers, batch_size, -1),
            mask_BS=outputs.label_mask[:batch_size],
            router_logits=[logits[: len(logits) // self.num_tiers] for logits in router_logits],
        )
        return self._first_tier(outputs, batch_size)

    def _first_tier(self, outputs: Any, batch_size: int) -> Any:
        per_row = {
            field.name: value[:batch_size]
            for field in fields(outputs)
            if isinstance(value := getattr(outputs, field.name), torch.Tensor) and value.dim() > 0
        }
        return type(outputs)(**per_row)
