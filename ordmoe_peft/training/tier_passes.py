"""The tier passes of a batch: its rows, once for each tier that is needed, in one forward or tier by tier.

With reference responses a tier's rows are the batch itself; with generated ones they are the batch's prompts, each with
what that tier wrote. The first rows are always the batch itself on tier 1, which supervised fine-tuning learns from.

Tier by tier, only one pass holds a graph at a time: a caller takes the gradient of the first and drops the graph, then
of each that [`TierPasses.run_pass`] runs. Passes without gradient come before, so that they are not on top of a graph.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ..data.responses import IGNORED_LABEL
from ..monitoring.router_records import recorded_router_outputs
from ..router_output import RouterOutput
from ..tiers.plan import RandomDraw
from ..tiers.routing import adapter_config, tier_routing
from ..tiers.scope import tiers_of_labels
from .random_state import RandomState
from .row_layout.prompt_sharing import PromptSharing
from .row_layout.separate import stack_rows
from .row_layout.shared_prompt import PackedRows
from .score_labels import score_labelled


# The place of the batch's own rows where tiers have responses of their own.
UNRANKED = 0

# Tier → log-probabilities and labels of its rows, each (B, S).
Scored = dict[int, tuple[torch.Tensor, torch.Tensor]]


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
        routing (`list` of [`~ordmoe_peft.router_output.RouterOutput`]): tier 1's over the batch (T = B·S'), per MoE
            layer.
    """

    log_probs_CBS: torch.Tensor
    labels_CBS: torch.Tensor
    reference_CBS: torch.Tensor | None
    ntp_loss: torch.Tensor
    tiers: list[int]
    attention_mask_BS: torch.Tensor
    routing: list[RouterOutput]

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


@dataclass
class Forward:
    """What a forward over several groups of rows says of them, as if each row had been one of its own.

    Args:
        outputs ([`~transformers.utils.ModelOutput`]): per-token fields, one group's rows after another's.
        scored (`dict`): (log-probabilities, labels) of each group's tier, `(B, S)` each.
        attention_mask_BS (`torch.Tensor` of shape `(B, S')`): of the first group's rows.
        first_group (`Callable`): from values of all tokens, as router logits, to those of the first group's.
    """

    outputs: Any
    scored: Scored
    attention_mask_BS: torch.Tensor
    first_group: Callable[[torch.Tensor], torch.Tensor]


class TierPasses:
    """Stands in for the model in `SFTTrainer.compute_loss`: runs the tiers, answers with the batch's own rows.

    So the loss and the metrics of supervised fine-tuning stay TRL's own, of tier 1, from the same forward. What the
    other rows gave is left in `scores`.

    With `tier_by_tier` a call runs the batch's own rows alone, as pass 0, and [`TierPasses.run_pass`] each of the
    others; `scores` then has a graph for the pass that was run last, numbers for those before, and zeros
    for those to come, or with `looks_ahead` numbers for these too.

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
        records_routing (`bool`): whether tier 1's routing is needed.
        sharing (`PromptSharing`, *optional*): computes prompts once for all tiers of a forward; without it each tier
            has rows of its own.
        step (`int`), first_sample (`int`): what `random` grouping draws from, see [`~ordmoe_peft.tier_routing`].
        tier_by_tier (`bool`): whether each tier has a forward of its own.
        looks_ahead (`bool`): whether the tiers that are to come are first run without gradient, which costs a forward
            of each; with the same dropout as in their pass.
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
        sharing: PromptSharing | None = None,
        step: int = 0,
        first_sample: int = 0,
        tier_by_tier: bool = False,
        looks_ahead: bool = False,
    ):
        self.model, self.moe_model = model, moe_model
        self.num_tiers, self.active, self.watched = num_tiers, list(active), list(watched)
        self.written, self.scored_by, self.pad_token_id = written, scored_by, pad_token_id
        self.needs_reference, self.records_routing = needs_reference, records_routing
        self.draw = {"step": step, "first_sample": first_sample}
        self.sharing = sharing
        self.tier_by_tier, self.looks_ahead = tier_by_tier, looks_ahead
        self.scores: TierScores | None = None
        self._groups: list[RowGroup] = []
        self._scored: Scored = {}
        self._draws: dict[int, RandomState] = {}

    def tiers_of_pass(self, place: int) -> list[int]:
        """The tiers that hold in a pass, from the first one, 0."""
        groups = self._groups[place : place + 1] if self.tier_by_tier else self._groups
        return sorted({group.routed_by for group in groups})

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        batch_size = len(inputs["labels"])
        self._groups = self._row_groups(inputs)
        if self.sharing is not None and self.sharing.awaits_verdict and not self.tier_by_tier:
            self._judge_sharing(self._groups)
        with torch.no_grad():
            reference = self._run_reference() if self.needs_reference else None
            self._scored = self._run_all([RowGroup(tier, tier, inputs) for tier in self.watched])
            if self.tier_by_tier and self.looks_ahead:
                self._look_ahead()
        together = self._groups[:1] if self.tier_by_tier else self._groups
        with recorded_router_outputs(self.moe_model, enabled=self.records_routing) as routing:
            forward = self._run(together)
        self._scored |= forward.scored
        outputs = _first_rows(forward.outputs, batch_size)
        self.scores = TierScores(
            log_probs_CBS=self._stack(self._scored, 0),
            labels_CBS=self._stack(self._scored, 1),
            reference_CBS=None if reference is None else self._stack(reference, 0),
            ntp_loss=-outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1),
            tiers=self._tiers_run(),
            attention_mask_BS=forward.attention_mask_BS,
            routing=[output.of_tokens(forward.first_group) for output in routing],
        )
        return outputs

    def run_pass(self, place: int) -> None:
        """Run pass `place`, from 1, after [`TierPasses.drop_graph`]; `scores` then has its graph."""
        draw = self._draws.get(place)
        with nullcontext() if draw is None else draw.replayed():
            self._scored |= self._run([self._groups[place]]).scored
        self.scores = replace(
            self.scores,
            log_probs_CBS=self._stack(self._scored, 0),
            labels_CBS=self._stack(self._scored, 1),
            tiers=self._tiers_run(),
        )

    def drop_graph(self) -> None:
        """Keep the numbers alone: backward leaves some of a graph's memory to whom still refers to it."""
        self._scored = {tier: (values.detach(), labels) for tier, (values, labels) in self._scored.items()}
        self.scores = replace(
            self.scores,
            log_probs_CBS=self.scores.log_probs_CBS.detach(),
            ntp_loss=self.scores.ntp_loss.detach(),
            routing=[],
        )

    def _look_ahead(self) -> None:
        for place, group in enumerate(self._groups[1:], start=1):
            self._draws[place] = RandomState.now(group.inputs["input_ids"].device)
            self._scored |= self._run([group]).scored

    def _run_reference(self) -> Scored:
        with self.moe_model.disable_adapter():
            return self._run_all(self._groups)

    def _run_all(self, groups: list[RowGroup]) -> Scored:
        """The scores of groups that no gradient is taken of; none of none."""
        batches = [[group] for group in groups] if self.tier_by_tier else [groups] if groups else []
        scored: Scored = {}
        for batch in batches:
            scored |= self._run(batch).scored
        return scored

    def _tiers_run(self) -> list[int]:
        return sorted(tier for tier in self._scored if tier != UNRANKED)

    def _row_groups(self, inputs: dict[str, Any]) -> list[RowGroup]:
        if self.written is None:
            return [RowGroup(tier, tier, inputs) for tier in (1, *(tier for tier in self.active if tier != 1))]
        groups = [RowGroup(UNRANKED, 1, inputs)]
        flags = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
        for tier, rows in zip(self.active, self.written, strict=True):
            groups.append(RowGroup(tier, tier if self.scored_by == "tier" else 1, flags | rows))
        return groups

    def _run(self, groups: list[RowGroup]) -> Forward:
        packed = None
        if self.sharing is not None and self.sharing.is_judged:
            packed = self.sharing.pack([group.inputs for group in groups], [group.routed_by for group in groups])
        return self._run_rows(groups) if packed is None else self._run_packed(groups, packed)

    def _run_rows(self, groups: list[RowGroup]) -> Forward:
        """One forward, a row for each group and sample."""
        rows = stack_rows([group.inputs for group in groups], self.pad_token_id)
        batch_size = len(groups[0].inputs["labels"])
        tiers = torch.tensor([group.routed_by for group in groups]).repeat_interleave(batch_size)
        tiers = tiers_of_labels(tiers, rows["labels"], adapter_config(self.moe_model).token_scope)
        with tier_routing(self.moe_model, tiers, draw=RandomDraw(num_samples=batch_size, **self.draw)):
            outputs = self._score(rows)
        return Forward(
            outputs,
            _scored(outputs, groups, rows["labels"]),
            # Padding-free rows have no mask, and no padding.
            rows.get("attention_mask", torch.ones_like(rows["input_ids"]))[:batch_size],
            lambda values_TX: values_TX[: len(values_TX) // len(groups)],
        )

    def _score(self, inputs: dict[str, Any]) -> Any:
        return score_labelled(self.model, self.moe_model.get_base_model().base_model, inputs)

    def _run_packed(self, groups: list[RowGroup], packed: PackedRows) -> Forward:
        """One forward, a row for each sample."""
        with tier_routing(self.moe_model, packed.tiers_NS, draw=RandomDraw(positions=packed.places_NS, **self.draw)):
            outputs = packed.as_separate_rows(self._score(packed.inputs))
        labels = stack_rows([{name: group.inputs[name] for name in ("input_ids", "labels")} for group in groups], 0)
        mask_BS = groups[0].inputs["attention_mask"]
        return Forward(outputs, _scored(outputs, groups, labels["labels"]), mask_BS, packed.first_tier)

    def _judge_sharing(self, groups: list[RowGroup]) -> None:
        """Run the batch with shared prompts and without, once, so that no model learns from what is not the same."""
        groups = [replace(group, routed_by=1) for group in groups]
        packed = self.sharing.pack([group.inputs for group in groups], [group.routed_by for group in groups])
        if not self.sharing.can_judge(packed, groups[0].inputs["input_ids"].device):
            return
        was_training = self.moe_model.training
        self.moe_model.eval()
        with torch.no_grad():
            both = [self._run_packed(groups, packed).outputs, self._run_rows(groups).outputs]
        self.moe_model.train(was_training)
        # The first rows are the same in both; what is in question is the branches.
        branches = slice(len(groups[0].inputs["labels"]), None)
        self.sharing.judge(*(rows.log_probs[branches] for rows in both), both[1].label_mask[branches])

    def _stack(self, scored: Scored, part: int) -> torch.Tensor:
        width = max(group.inputs["labels"].shape[1] for group in self._groups) - 1
        filler = (0, IGNORED_LABEL)[part]
        example = next(iter(scored.values()))[part]
        absent = example.new_full((len(example), width), filler)
        parts = {tier: both[part] for tier, both in scored.items()}
        return torch.stack([_widened(parts.get(tier, absent), width, filler) for tier in range(1, self.num_tiers + 1)])


def _widened(values_BS: torch.Tensor, width: int, filler: int) -> torch.Tensor:
    return torch.nn.functional.pad(values_BS, (0, width - values_BS.shape[1]), value=filler)


def _scored(outputs: Any, groups: list[RowGroup], labels_NS: torch.Tensor) -> Scored:
    """(Log-probabilities, labels) by tier, of outputs and labels of separate rows."""
    # With a model split over devices the head may be on another one than its inputs.
    labels_NS = labels_NS[:, 1:].to(outputs.log_probs.device)
    parts = zip(outputs.log_probs.chunk(len(groups)), labels_NS.chunk(len(groups)), strict=True)
    return {group.tier: part for group, part in zip(groups, parts, strict=True)}


def _first_rows(outputs: Any, batch_size: int) -> Any:
    per_row = {
        field.name: value[:batch_size]
        for field in fields(outputs)
        if isinstance(value := getattr(outputs, field.name), torch.Tensor) and value.dim() > 0
    }
    return type(outputs)(**per_row)
