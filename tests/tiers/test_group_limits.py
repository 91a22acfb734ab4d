"""Routers that limit their choice to groups, however they write it, against ranks counted by hand."""

import pytest
import torch
from torch import nn

from ordmoe_peft import tier_routing
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tiers.group_limits import hides_experts
from ordmoe_peft.tiers.routing import check_router, install_tier_hooks
from tests import models


E, K, NUM_GROUPS = models.NUM_EXPERTS, models.TOP_K, 4


def masked_fill(scores, keep):
    return scores.masked_fill(~keep, float("-inf"))


def torch_masked_fill(scores, keep):
    return torch.masked_fill(scores, ~keep, 0.0)


def where(scores, keep):
    return torch.where(keep, scores, float("-inf"))


def where_from_zeros(scores, keep):
    return torch.where(keep, scores, torch.zeros_like(scores))


def in_place(scores, keep):
    return scores.masked_fill_(~keep, torch.finfo(scores.dtype).min)


def by_assignment(scores, keep):
    scores[~keep] = float("-inf")
    return scores


def on_a_view(scores, keep):
    scores.view(len(scores), NUM_GROUPS, -1)[~keep.view(len(scores), NUM_GROUPS, -1)] = float("-inf")
    return scores


def product(scores, keep):
    return scores * keep


def product_by_group(scores, keep):
    by_group = scores.view(len(scores), NUM_GROUPS, -1) * keep.view(len(scores), NUM_GROUPS, -1).to(scores.dtype)
    return by_group.flatten(1)


def added(scores, keep):
    return scores + torch.zeros_like(scores).masked_fill(~keep, float("-inf"))


def then_copied(scores, keep):
    return torch.where(keep, scores, float("-inf")).clone().float().contiguous()


WAYS = [masked_fill, torch_masked_fill, where, where_from_zeros, in_place, by_assignment, on_a_view, product]
WAYS += [product_by_group, added, then_copied]


class GroupRouter(nn.Module):
    """Keeps the two of four groups with the best experts, then chooses K among these."""

    def __init__(self, router, limit):
        super().__init__()
        self.weight, self.top_k, self.limit = router.weight, K, limit

    def scores(self, hidden_states):
        return nn.functional.linear(hidden_states, self.weight).sigmoid()

    def forward(self, hidden_states):
        scores = self.scores(hidden_states)
        groups = scores.view(len(scores), NUM_GROUPS, -1).amax(-1).topk(2, dim=-1).indices
        keep = torch.zeros(len(scores), NUM_GROUPS, dtype=torch.bool).scatter(1, groups, True)
        limited = self.limit(scores.clone(), keep.repeat_interleave(E // NUM_GROUPS, 1))
        index = torch.topk(limited, self.top_k, dim=-1).indices
        return scores.logit(), scores.gather(1, index), index


def expected_ranks(scores_E: list[float], num_tiers: int) -> list[int]:
    """Experts by rank: those of the kept groups where these are enough for the tiers, else all, the chosen first."""
    by_score = sorted(range(E), key=lambda expert: -scores_E[expert])
    size = E // NUM_GROUPS
    groups = sorted(range(NUM_GROUPS), key=lambda group: -max(scores_E[group * size : (group + 1) * size]))[:2]
    kept = [expert for expert in by_score if expert // size in groups]
    return kept if num_tiers * K <= len(kept) else kept[:K] + [expert for expert in by_score if expert not in kept[:K]]


def with_router(limit) -> nn.Module:
    model = models.qwen3_moe()
    for layer in model.model.layers:
        layer.mlp.gate = GroupRouter(layer.mlp.gate, limit)
    return model


@pytest.mark.parametrize("num_tiers", [2, 3, 4])
@pytest.mark.parametrize("limit", WAYS, ids=lambda limit: limit.__name__)
def test_ranks_are_those_of_the_scores_however_the_limit_is_written(limit, num_tiers):
    model, x = with_router(limit), torch.randn(40, models.HIDDEN_SIZE)
    router = MoEModel.of(model).layers[0].router
    router.register_forward_pre_hook(lambda module, args: (x,), prepend=True)
    seen = []
    install_tier_hooks(model)
    router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    for tier in range(1, num_tiers + 1):
        with tier_routing(model, tier, num_tiers=num_tiers, grouping="high_only", layer_scope=[0]), torch.no_grad():
            model(torch.arange(1, 41)[None])
        for scores, chosen in zip(router.scores(x).tolist(), seen[-1].tolist(), strict=True):
            ranked = expected_ranks(scores, num_tiers)
            assert set(chosen) == set(ranked[(tier - 1) * K : tier * K])


UNKNOWN_WAYS = {
    "logits masked before softmax": lambda scores, keep: scores.logit().masked_fill(~keep, -torch.inf).softmax(-1),
    "a penalty": lambda scores, keep: scores + (1 - keep.float()) * -1e4,
    "a small penalty": lambda scores, keep: scores - 10 * (1 - keep.float()),
    "something added after": lambda scores, keep: scores * keep + 0.01,
    "scaled after": lambda scores, keep: scores.masked_fill(~keep, -1.0) * 2,
    "damped": lambda scores, keep: scores * (keep + (1 - keep.float()) * 1e-3),
    "by way of NaN": lambda scores, keep: torch.nan_to_num(torch.where(keep, scores, torch.nan), nan=0.0),
}


@pytest.mark.parametrize("limit", UNKNOWN_WAYS.values(), ids=UNKNOWN_WAYS)
def test_a_limit_that_is_not_recognised_is_refused_by_name(limit):
    """What the experts of other groups would have had is lost, or their scores are moved by a finite amount."""
    model = with_router(limit)
    with pytest.raises(OrdMoEModelError, match=r"layers\.0\.mlp\.gate \(GroupRouter\) leaves experts out"):
        install_tier_hooks(model)
    assert not hasattr(model.model.layers[0].mlp.gate, "tier_hook_handles")


def test_routers_without_limits_are_not_watched_for_them(model):
    assert not any(check_router(layer).may_limit for layer in MoEModel.of(model).layers)
    assert all(check_router(layer).may_limit for layer in MoEModel.of(models.deepseek_v3()).layers)


def test_what_looks_like_experts_left_out():
    scores = torch.rand(3, 8) + 0.1
    assert not hides_experts(scores)
    assert not hides_experts(scores.index_fill(1, torch.tensor([2]), 0.0)), "one score may be 0"
    assert hides_experts(scores.index_fill(1, torch.tensor([2, 5]), 0.0))
    assert hides_experts(scores.index_fill(1, torch.tensor([2]), float("-inf")))
    underflown = torch.tensor([[0.0, 0.0, 1e-40, 1e-30, 1e-12, 1.0]])
    assert not hides_experts(underflown), "a confident softmax"
