"""The tier passes of a micro-batch, as values: which rows run on which tier, in which order, and what they score.

With reference responses a tier's rows are the batch itself; with generated ones they are the batch's prompts, each with
what that tier generated. The first rows are always the batch itself on tier 1: supervised fine-tuning learns from them.

    C = 3, evenly spaced rewards        batched                 sequential, one graph at a time
    reference responses                 pass 0: tiers 1, 3      pass 0: tier 1      pass 1: tier 3
    generated responses                 pass 0: batch, 1, 3     pass 0: batch       pass 1: tier 1     pass 2: tier 3

What needs no gradient (the frozen base, tiers that are only logged, precomputed scores) runs before pass 0, so that it
is not on top of a graph.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from ..monitoring.recording import recorded_router_outputs
from ..tiers.plan import RandomDraw
from ..tiers.routing import adapter_config, tier_routing
from ..tiers.scope import IGNORED_LABEL
from .losses import mean_balance_loss
from .random_state import RandomState
from .row_groups import RowGroup
from .row_layout.prompt_sharing import PromptSharing
from .row_layout.separate import SeparateRows, separate_rows, stack_rows
from .row_layout.shared_prompt import SharedPromptRows
from .score_labels import score_labelled
from .tier_scores import Scored, TierScores


@dataclass(frozen=True)
class ForwardScores:
    """What one forward says of groups of rows, as if each group had a forward of its own.

    Args:
        first_group ([`~transformers.utils.ModelOutput`]): the per-token outputs of the first group's rows.
        scored (`dict`): log-probabilities and labels of each group's tier.
        balance_loss (`torch.Tensor`, scalar): of the first group's rows; 0 where it was not asked for.
    """

    first_group: Any
    scored: Scored
    balance_loss: torch.Tensor


@dataclass(frozen=True)
class TierForward:
    """Forwards over groups of rows, each row held to its group's tier.

    Args:
        model (`Callable`): the model with TRL's fused head, as the trainer wraps it.
        moe_model (`nn.Module`): the same without wrapping, whose routers are held to tiers.
        pad_token_id (`int`): fills rows that are shorter than others.
        sharing ([`PromptSharing`], *optional*): computes prompts once for all tiers of a forward; without it each tier
            has rows of its own.
        draw ([`~ordmoe_peft.tiers.plan.RandomDraw`]): the micro-batch's own, of `random` grouping.
        needs_balance (`bool`): whether the balance loss of a micro-batch's own rows is needed.
    """

    model: Callable
    moe_model: nn.Module
    pad_token_id: int
    sharing: PromptSharing | None = None
    draw: RandomDraw = field(default_factory=RandomDraw)
    needs_balance: bool = False

    def passes(
        self,
        groups: list[RowGroup],
        num_tiers: int,
        *,
        logged_tiers: Sequence[int] = (),
        needs_reference: bool = False,
        is_sequential: bool = False,
        precompute_scores: bool = False,
    ) -> list["TierPass"]:
        """The passes of a micro-batch, after all that is run without gradient.

        Args:
            groups (`list` of [`RowGroup`]): its rows, see [`row_groups`].
            num_tiers (`int`): C.
            logged_tiers (sequence of `int`): further tiers, run on reference responses to log them.
            needs_reference (`bool`): whether the frozen base scores the rows as well.
            is_sequential (`bool`): whether each group has a pass of its own.
            precompute_scores (`bool`): whether the groups of later passes are first run without gradient, with the same
                dropout as in their pass, so that pass 0 knows the scores of all.
        """
        if self.sharing is not None and self.sharing.awaits_verdict and not is_sequential:
            self._judge(self.sharing, groups)
        by_pass = [[group] for group in groups] if is_sequential else [groups]
        states: list[RandomState | None] = [None] * len(by_pass)
        with torch.no_grad():
            reference: Scored = {}
            if needs_reference:
                with self.moe_model.disable_adapter():
                    reference = self._scored(by_pass)
            logged = [RowGroup(tier, tier, groups[0].inputs) for tier in logged_tiers]
            scored = self._scored([[group] for group in logged] if is_sequential else [logged] if logged else [])
            for index, together in enumerate(by_pass[1:] if precompute_scores else [], start=1):
                states[index] = RandomState.now(together[0].inputs["input_ids"].device)
                scored |= self.run(together).scored
        width = max(group.inputs["labels"].shape[1] for group in groups) - 1
        known = TierScores(num_tiers, width, scored, reference)
        return [
            TierPass(self, index, together, known, is_last=index == len(by_pass) - 1, random_state=state)
            for index, (together, state) in enumerate(zip(by_pass, states, strict=True))
        ]

    def run(self, groups: list[RowGroup], needs_balance: bool = False) -> ForwardScores:
        """One forward over all rows of `groups`."""
        rows: SeparateRows | SharedPromptRows | None = None
        if self.sharing is not None and self.sharing.is_judged:
            rows = self._shared(self.sharing, groups)
        return self._run(groups, rows or self._separate(groups), needs_balance)

    def _separate(self, groups: list[RowGroup]) -> SeparateRows:
        tiers = [group.routed_by for group in groups]
        scope = adapter_config(self.moe_model).token_scope
        return separate_rows([group.inputs for group in groups], tiers, scope, self.pad_token_id)

    def _shared(self, sharing: PromptSharing, groups: list[RowGroup]) -> SharedPromptRows | None:
        return sharing.join([group.inputs for group in groups], [group.routed_by for group in groups])

    def _run(
        self, groups: list[RowGroup], rows: SeparateRows | SharedPromptRows, needs_balance: bool = False
    ) -> ForwardScores:
        draw = replace(self.draw, num_samples=rows.num_samples, positions=rows.positions)
        held = tier_routing(self.moe_model, rows.tiers, draw=draw)
        with recorded_router_outputs(self.moe_model, enabled=needs_balance) as routing, held:
            outputs = score_labelled(self.model, self.moe_model.get_base_model().base_model, rows.inputs)
        outputs = rows.as_separate_rows(outputs)
        # With a model split over devices the head may be on another one than its inputs.
        log_probs_NS = outputs.log_probs
        labels = stack_rows([{name: group.inputs[name] for name in ("input_ids", "labels")} for group in groups], 0)
        labels_NS = labels["labels"][:, 1:].to(log_probs_NS.device)
        parts = zip(log_probs_NS.chunk(len(groups)), labels_NS.chunk(len(groups)), strict=True)
        return ForwardScores(
            _first_rows(outputs, len(groups[0].inputs["labels"])),
            {group.tier: part for group, part in zip(groups, parts, strict=True)},
            mean_balance_loss(
                [output.of_tokens(rows.first_group) for output in routing], rows.first_mask, like=log_probs_NS
            ),
        )

    def _scored(self, batches: list[list[RowGroup]]) -> Scored:
        scored: Scored = {}
        for groups in batches:
            scored |= self.run(groups).scored
        return scored

    def _judge(self, sharing: PromptSharing, groups: list[RowGroup]) -> None:
        """Run the batch with shared prompts and without, once, so that no model learns from what is not the same."""
        groups = [replace(group, routed_by=1) for group in groups]
        shared = self._shared(sharing, groups)
        can_judge = sharing.can_judge(shared is not None, groups[0].inputs["input_ids"].device)
        if shared is None or not can_judge:
            return
        was_training = self.moe_model.training
        self.moe_model.eval()
        with torch.no_grad():
            both = [self._run(groups, rows).scored for rows in (shared, self._separate(groups))]
        self.moe_model.train(was_training)
        # The first rows are the same in both; what is in question is the branches.
        branches = [group.tier for group in groups[1:]]
        shared_log_probs, log_probs = (torch.cat([scored[tier][0] for tier in branches]) for scored in both)
        labels = torch.cat([both[1][tier][1] for tier in branches])
        sharing.judge(shared_log_probs, log_probs, labels != IGNORED_LABEL)


@dataclass
class TierPass:
    """One forward of a micro-batch, and in training its backward.

    Args:
        forward ([`TierForward`]): runs it.
        index (`int`): 0 for the pass with the batch's own rows.
        groups (`list` of [`RowGroup`]): the rows.
        previous ([`TierScores`]): what is known before it, numbers without a graph.
        is_last (`bool`): whether no pass of the micro-batch comes after it.
        random_state ([`RandomState`], *optional*): what its dropout was drawn from when its scores were precomputed.

    Attributes:
        scores ([`TierScores`]): what is known after it; set by [`TierPass.run`].
    """

    forward: TierForward
    index: int
    groups: list[RowGroup]
    previous: TierScores
    is_last: bool
    random_state: RandomState | None = None
    scores: TierScores = field(init=False, repr=False)

    @property
    def routed_by(self) -> list[int]:
        """The tiers that route its rows."""
        return sorted({group.routed_by for group in self.groups})

    def run(self) -> Any:
        """Run the forward and set `scores`. Returns the outputs for the rows of the first group."""
        is_first = self.index == 0
        with nullcontext() if self.random_state is None else self.random_state.replayed():
            found = self.forward.run(self.groups, needs_balance=is_first and self.forward.needs_balance)
        self.scores = replace(self.previous, by_tier=self.previous.by_tier | found.scored)
        if is_first:
            num_tokens = found.first_group.label_mask.sum().clamp(min=1)
            ntp_loss = -found.first_group.log_probs.sum() / num_tokens
            self.scores = replace(self.scores, ntp_loss=ntp_loss, balance_loss=found.balance_loss)
        return found.first_group


def _first_rows(outputs: Any, batch_size: int) -> Any:
    per_row = {
        part.name: value[:batch_size]
        for part in fields(outputs)
        if isinstance(value := getattr(outputs, part.name), torch.Tensor) and value.dim() > 0
    }
    return type(outputs)(**per_row)
