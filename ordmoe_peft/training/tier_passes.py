"""One forward for all tiers: the batch's rows, once for each tier that is needed.

With reference responses a tier's rows are the batch itself; with generated ones they are the batch's prompts, each with
what that tier wrote. The first rows are always the batch itself on tier 1, which supervised fine-tuning learns from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..responses import IGNORED_LABEL
from ..tiers.records import recorded_router_logits
from ..tiers.routing import adapter_config, tier_routing
from ..tiers.scope import tiers_of_labels
from .rows import stack_rows


# The place of the batch's own rows where tiers have responses of their own.
UNRANKED = 0


@dataclass
class TierScores:
    """What the tier passes say of a batch; tiers that were not run have zeros.

    Args:
        log_probs_CBS (`torch.Tensor` of shape `(C, B, S)`): log-probability of each label of each tier's response, 0
            where there is none.
        labels_CBS (`torch.Tensor` of shape `(C, B, S)`): those labels; `-100` where there is none.
        reference_CBS (`torch.Tensor` of shape `(C, B, S)`, *optional*): the frozen base's log-probabilities.
        ntp_loss (`torch.Tensor`, scalar): mean negative log-probability per token of the batch's own responses, tier 1.
        tiers (`list[int]`): the tiers that were run, from 1.
        attention_mask_BS (`torch.Tensor` of shape `(B, S')`): the batch's own, over all S' inputs of its rows.
        router_logits (`list` of `torch.Tensor` of shape `(B·S', E)`): tier 1's over the batch, per MoE layer.
    """

    log_probs_CBS: torch.Tensor
    labels_CBS: torch.Tensor
    reference_CBS: torch.Tensor | None
    ntp_loss: torch.Tensor
    tiers: list[int]
    attention_mask_BS: torch.Tensor
    router_logits: list[torch.Tensor]

    @property
    def mask_CBS(self) -> torch.Tensor:
        """Where there is a label."""
        return self.labels_CBS != IGNORED_LABEL


@dataclass
class RowGroup:
    """A batch of rows for a tier: whose response they hold, and which tier routes them."""

    tier: int
    routed_by: int
    inputs: dict[str, Any]


class TierPasses:
    """Stands in for the model in `SFTTrainer.compute_loss`: runs all tiers, answers with the batch's own rows.

    So the loss and the metrics of supervised fine-tuning stay TRL's own, of tier 1, from the same forward. What the
    other rows gave is left in `scores`.

    Args:
        model (`Callable`): the model as the trainer wraps it.
        moe_model (`nn.Module`): the model whose routers are held to tiers.
        num_tiers (`int`): C.
        active (sequence of `int`): tiers that the objective has a gradient for.
        pad_token_id (`int`): fills rows that are shorter than others.
        watched (sequence of `int`): further tiers, run without gradient on reference responses, to log them.
        written (list of `dict`, *optional*): for each active tier the batch's prompts with what it wrote, as rows; by
            default all tiers score the batch's own responses.
        scored_by (`str`): `"tier"`, each generated response under the tier that wrote it, or `"policy"`, under tier 1.
        needs_reference (`bool`): whether the frozen base scores the rows as well.
        records_routing (`bool`): whether tier 1's router logits are needed.
        step (`int`), first_sample (`int`): what `random` grouping draws from, see [`~ordmoe_peft.tier_routing`].
    """

    def __init__(
        self,
        model: Callable,
        moe_model: nn.Module,
        *,
        num_tiers: int,
        active: Sequence[int],
        pad_token_id: int,
        watched: Sequence[int] = (),
        written: Sequence[dict[str, Any]] | None = None,
        scored_by: str = "tier",
        needs_reference: bool = False,
        records_routing: bool = False,
        step: int = 0,
        first_sample: int = 0,
    ):
        self.model, self.moe_model = model, moe_model
        self.num_tiers, self.active, self.watched = num_tiers, list(active), list(watched)
        self.written, self.scored_by, self.pad_token_id = written, scored_by, pad_token_id
        self.needs_reference, self.records_routing = needs_reference, records_routing
        self.draw = {"step": step, "first_sample": first_sample}
        self.scores: TierScores | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        groups = self._groups(inputs)
        with recorded_router_logits(self.moe_model, enabled=self.records_routing) as router_logits:
            outputs, rows, scored = self._run(groups)
        if self.watched:
            with torch.no_grad():
                scored |= self._run([RowGroup(tier, tier, inputs) for tier in self.watched])[2]
        reference = None
        if self.needs_reference:
            with torch.no_grad(), self.moe_model.disable_adapter():
                reference = self._run(groups)[2]
        batch_size = len(inputs["labels"])
        self.scores = TierScores(
            log_probs_CBS=self._stack(scored, 0),
            labels_CBS=self._stack(scored, 1),
            reference_CBS=None if reference is None else self._stack(reference, 0),
            ntp_loss=-outputs.log_probs[:batch_size].sum() / outputs.label_mask[:batch_size].sum().clamp(min=1),
            tiers=sorted(tier for tier in scored if tier != UNRANKED),
            # Padding-free rows have no mask, and no padding.
            attention_mask_BS=rows.get("attention_mask", torch.ones_like(rows["input_ids"]))[:batch_size],
            router_logits=[logits[: len(logits) // len(groups)] for logits in router_logits],
        )
        return _first_rows(outputs, batch_size)

    def _groups(self, inputs: dict[str, Any]) -> list["RowGroup"]:
        if self.written is None:
            return [RowGroup(tier, tier, inputs) for tier in (1, *(tier for tier in self.active if tier != 1))]
        groups = [RowGroup(UNRANKED, 1, inputs)]
        for tier, rows in zip(self.active, self.written, strict=True):
            groups.append(RowGroup(tier, tier if self.scored_by == "tier" else 1, rows))
        return groups

    def _run(
        self, groups: list["RowGroup"]
    ) -> tuple[Any, dict[str, Any], dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        """One forward. Returns its outputs, its rows, and (log-probabilities, labels) by tier."""
        rows = stack_rows([group.inputs for group in groups], self.pad_token_id)
        batch_size = len(groups[0].inputs["labels"])
        tiers = torch.tensor([group.routed_by for group in groups]).repeat_interleave(batch_size)
        tiers = tiers_of_labels(tiers, rows["labels"], adapter_config(self.moe_model).token_scope)
        with tier_routing(self.moe_model, tiers, num_samples=batch_size, **self.draw):
            outputs = self.model(**rows)
        # With a model split over devices the head may be on another one than its inputs.
        labels_BS = rows["labels"][:, 1:].to(outputs.log_probs.device)
        log_probs, labels = outputs.log_probs.split(batch_size), labels_BS.split(batch_size)
        return outputs, rows, {group.tier: (log_probs[i], labels[i]) for i, group in enumerate(groups)}

    def _stack(self, scored: dict[int, tuple[torch.Tensor, torch.Tensor]], part: int) -> torch.Tensor:
        filler = torch.full_like(next(iter(scored.values()))[part], (0, IGNORED_LABEL)[part], requires_grad=False)
        return torch.stack([scored[tier][part] if tier in scored else filler for tier in range(1, self.num_tiers + 1)])


def _first_rows(outputs: Any, batch_size: int) -> Any:
    per_row = {
        field.name: value[:batch_size]
        for field in fields(outputs)
        if isinstance(value := getattr(outputs, field.name), torch.Tensor) and value.dim() > 0
    }
    return type(outputs)(**per_row)
