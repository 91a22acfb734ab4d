"""A router's choice, answered by tier.

While a router runs, its `torch.topk` over the E scores is answered with the experts of the token's tier in place of the
first K. What the router makes of the chosen scores is its business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..forward import RunningForward
from ..moe_model import MoELayer
from .group_limits import Limit, ScoreHistory, hides_experts
from .plan import TierPlan
from .ranking import first_rank, random_order, rank_experts, ranks_of_tiers


ONE_TIER = "Use one tier for all rows, token_scope='sequence', and grouping 'uniform' or 'high_only'."


@dataclass(frozen=True)
class RouterSizes:
    """What a selection has to know of a router.

    Args:
        name (`str`): its name in the model.
        num_experts (`int`), top_k (`int`): E and K.
        most_scores (`int`): rows of its matrix: E, or more where it scores what are no experts, too (shared experts, a
            class for skipping the layer).
        may_limit (`bool`, defaults to `True`): whether it may leave experts out of its choice.
        score_dims (`frozenset[int]`): dimensions of the scores that it chooses from: 2 for `(T, E)`, 3 for `(B, S, E)`,
            or both, if that depends on its input.
        is_ranked (`bool`, defaults to `True`): whether it ranks experts; else it chooses them by something else, as by
            the token (hash layers of DeepSeek-V4), and routes as usual on all tiers.
        by_rounds (`bool`, defaults to `False`): whether it chooses one expert after the other by their largest scores.
        router_in_block (`str`, defaults to `""`): where the router gives scores alone and the block chooses, the
            router's name in its block.
        has_weights (`bool`, defaults to `True`): whether it returns the weights of its choice.
        is_readable (`bool`, defaults to `True`): whether it returns logits, weights and indices of its choice.
        renormalises (`bool`, defaults to `False`): whether the weights of a token's experts sum to the same for all
            tokens.
        calls_matrix (`bool`, defaults to `True`): whether it calls the module that has its matrix, so that LoRA on that
            has an effect.
    """

    name: str
    num_experts: int
    top_k: int
    most_scores: int
    may_limit: bool = True
    score_dims: frozenset[int] = frozenset({2})
    is_ranked: bool = True
    by_rounds: bool = False
    router_in_block: str = ""
    has_weights: bool = True
    is_readable: bool = True
    renormalises: bool = False
    calls_matrix: bool = True

    @classmethod
    def of(cls, layer: MoELayer, **known: Any) -> "RouterSizes":
        return cls(layer.router_name, layer.num_experts, layer.top_k, layer.num_scores, **known)


class TierSelection(TorchFunctionMode):
    """Answers a router's `torch.topk` over its E scores with the K experts of each token's tier.

    Args:
        router ([`RouterSizes`]): the router.
        index (`int`): of its layer, which `random` draws from.
        plan ([`~ordmoe_peft.tiers.plan.TierPlan`]): the tiers.
        forward ([`~ordmoe_peft.forward.RunningForward`], *optional*): the forward that the router is part of, for plans
            that depend on rows.

    Attributes:
        selections (`int`): how many choices were answered.
        index_TK (`torch.Tensor` of shape `(T, K)`): the last answer.
        tokens (`slice` or `torch.Tensor` of shape `(T,)`): which of all rows' positions the router's tokens are.
        limit ([`~ordmoe_peft.tiers.group_limits.Limit`], *optional*): the limit on what the last was made from.
        hides_ranks (`bool`): whether ranks below the K chosen cannot be read from it. Known where limits are watched.
    """

    def __init__(self, router: RouterSizes, index: int, plan: TierPlan, forward: RunningForward | None = None):
        super().__init__()
        self.router, self.index, self.plan, self.forward = router, index, plan, forward
        self.selections = 0
        self.hides_ranks = False
        self.limit: Limit | None = None
        self.tokens: slice | torch.Tensor = slice(None)
        self.index_TK: torch.Tensor | None = None
        self._history = ScoreHistory() if router.may_limit else None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs) if self._history is None else self._history.call(func, args, kwargs)
        if func not in (torch.topk, torch.Tensor.topk) or not self._is_selection(result.indices, *args, **kwargs):
            return result
        self.selections += 1
        scores, left_out_TE = args[0] if args else kwargs["input"], None
        scores_TE = scores.reshape(-1, scores.shape[-1])
        if self._history is not None:
            self.limit = self._history.limit_on(scores)
            self.hides_ranks = self.limit is None and (hides_experts(scores_TE) or self._history.hides_ranks(scores))
            scores_TE, left_out_TE = self.limit or (scores_TE, None)
        index_TK = self.index_TK = self._choose(scores_TE, left_out_TE, result.indices.reshape(len(scores_TE), -1))
        index = index_TK.view_as(result.indices)
        return torch.return_types.topk((scores_TE.gather(1, index_TK).view_as(index), index))

    def begin_at(self, scores: Any) -> None:
        """Take `scores`, which LoRA has added to, for the first ones: what they were made from is of no account."""
        if self._history is not None:
            self._history.begin_at(scores)

    def _is_selection(self, index, input, k, dim=-1, largest=True, sorted=True) -> bool:
        # Group-limited routers also rank groups, on tensors of one more dimension; only the choice among all experts is
        # the tier's.
        return self._is_over_experts(input, dim) and largest and k == self.router.top_k

    def _is_over_experts(self, scores: torch.Tensor, dim: int) -> bool:
        is_last = scores.dim() in self.router.score_dims and dim in (-1, scores.dim() - 1)
        return is_last and self.router.num_experts <= scores.shape[-1] <= self.router.most_scores

    @property
    def running(self) -> RunningForward:
        """The forward that the router is part of, where the plan depends on it."""
        assert self.forward is not None, "a plan that depends on rows is made for a running forward"
        return self.forward

    def _choose(
        self, scores_TE: torch.Tensor, left_out_TE: torch.Tensor | None, top_k_index_TK: torch.Tensor
    ) -> torch.Tensor:
        """The experts of each token's tier (`torch.Tensor` of shape `(T, K)`), on tier 1 as the router gave them."""
        plan, settings, top_k = self.plan, self.plan.settings, self.router.top_k
        if plan.needs_rows:
            self.tokens = self.running.tokens_of(self.router.name, scores_TE, ONE_TIER)
        ranked_TE = rank_experts(scores_TE.detach(), top_k_index_TK, left_out_TE, settings.num_tiers * top_k)
        if plan.is_random:
            row_T, position_T = (values_T[self.tokens] for values_T in self._rows_and_positions(scores_TE.device))
            ranked_TE = random_order(ranked_TE, top_k, row_T, position_T, settings.seed, plan.draw.step, self.index)
        num_ranked = ranked_TE.shape[1]
        if plan.only_tier is not None:
            start = first_rank(plan.only_tier, settings.num_tiers, num_ranked, top_k, settings.grouping) - 1
            return top_k_index_TK if plan.only_tier == 1 else ranked_TE[:, start : start + top_k].contiguous()
        tier_T = self.running.tier_of_token(ranked_TE.device)
        rank_TK = self.running.once(
            ("ranks", ranked_TE.device, num_ranked, top_k),
            lambda: ranks_of_tiers(tier_T, settings.num_tiers, num_ranked, top_k, settings.grouping),
        )
        is_top_T1 = (tier_T[self.tokens] == 1).unsqueeze(1)
        return torch.where(is_top_T1, top_k_index_TK, ranked_TE.gather(1, rank_TK[self.tokens]))

    def _rows_and_positions(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample and position of each token, counted over the whole sequence, cached part included."""
        forward, draw = self.running, self.plan.draw
        num_rows, length = forward.shape
        token_T = torch.arange(num_rows * length, device=device)
        row_T = token_T // length
        if len(self.plan.tiers) > 1:  # what generation repeats, as for beams, is one row
            row_T = row_T // self.plan.rows_per_tier(num_rows)
        sample_T = row_T % draw.num_samples if draw.num_samples else row_T
        if draw.positions is None:
            position_T = token_T % length + forward.past_length
        else:
            position_T = draw.positions.reshape(-1).to(device)
        return sample_T + draw.first_sample, position_T


class RoundSelection(TierSelection):
    """The same for a router that chooses one expert after the other, each by the largest score (PhiMoE's sparsemixer,
    Switch): in every such round, it sees no scores but those of the experts of each token's tier.

    The scores that the first round is over stand for themselves in whatever the router makes of them afterwards, so
    that a weight is computed as if the experts of other tiers were far from being chosen.
    """

    hidden_TE: torch.Tensor  # which experts the tokens' tiers do not have, once there was a round
    _scores: torch.Tensor | None = None  # what the first round was over
    _seen: torch.Tensor | None = None  # the same as the tiers see them

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.max, torch.Tensor.max, torch.argmax, torch.Tensor.argmax) and self._is_round(*args, **kwargs):
            if self._scores is None:
                self.selections, self._scores = 1, args[0]
                self.hidden_TE = self._hidden_from_tiers(args[0].detach().reshape(-1, args[0].shape[-1]))
                with torch.enable_grad():  # the first round may be without, and the weights made of this not
                    self._seen = self._as_seen(args[0])
            args = (self._as_seen(args[0]), *args[1:])
        return func(*(self._seen if arg is not None and arg is self._scores else arg for arg in args), **kwargs)

    def _is_round(self, scores: torch.Tensor, dim: Any = None, *others: Any, **kwargs: Any) -> bool:
        return type(dim) is int and self._is_over_experts(scores, dim)

    def _as_seen(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self.hidden_TE.view_as(scores), torch.finfo(scores.dtype).min)

    def _hidden_from_tiers(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """Which experts are of other tiers than each token's (`torch.Tensor` of shape `(T, E)`, bool); none are hidden
        on tier 1, which is the router's own choice."""
        index_TK = self._choose(scores_TE, None, scores_TE.topk(self.router.top_k).indices)
        hidden_TE = torch.ones_like(scores_TE, dtype=torch.bool).scatter(1, index_TK, False)
        if self.plan.only_tier is not None:
            return hidden_TE & (self.plan.only_tier != 1)
        return hidden_TE & (self.running.tier_of_token(scores_TE.device)[self.tokens] != 1).unsqueeze(1)
