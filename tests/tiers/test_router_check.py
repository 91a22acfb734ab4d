"""Routers of many kinds, judged by a trial: what is answered by tier, what routes as usual, what is refused by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from ordmoe_peft import tier_routing
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tiers.router_check import check_router
from tests import models


E, K, H = models.NUM_EXPERTS, models.TOP_K, models.HIDDEN_SIZE


class Router(nn.Module):
    """Rows of tokens or tokens of rows in, (logits, weights, indices) of tokens out."""

    def __init__(self):
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(E, H)), K

    def scores(self, hidden):
        return F.linear(hidden.reshape(-1, H), self.weight)

    def choose(self, scores):
        return scores.topk(self.top_k, dim=-1).indices

    def forward(self, hidden):
        scores = self.scores(hidden)
        index = self.choose(scores)
        return scores.flatten(0, -2), scores.softmax(-1).gather(-1, index).flatten(0, -2), index.flatten(0, -2)


class NeedsABias(Router):
    def forward(self, hidden, expert_bias):
        scores = self.scores(hidden)
        index = (scores.sigmoid() + expert_bias).topk(K, dim=-1).indices
        return scores, scores.sigmoid().gather(1, index), index


class TakesABiasAtWill(Router):
    """As LFM2-MoE's, which adds it all the same."""

    def forward(self, hidden, expert_bias=None):
        index = (self.scores(hidden) + expert_bias).topk(K, dim=-1).indices
        return self.scores(hidden), self.scores(hidden).gather(1, index), index


class OfRowsAlone(Router):
    def forward(self, hidden):
        rows, length, width = hidden.shape
        return super().forward(hidden.view(rows * length, width))


class InTheShapeGiven(Router):
    def scores(self, hidden):
        return F.linear(hidden, self.weight)


class OfRowsInTheirShape(OfRowsAlone):
    def forward(self, hidden):
        _rows, _length, _width = hidden.shape
        return Router.forward(self, hidden)

    def scores(self, hidden):
        return F.linear(hidden, self.weight)


class OneByOne(Router):
    def choose(self, scores):
        first = scores.max(dim=-1, keepdim=True).indices
        rest = scores.scatter(-1, first, -torch.inf)
        return torch.cat([first, rest.max(dim=-1, keepdim=True).indices], dim=-1)


class ViewsItsChoice(Router):
    """As DeepSeek's own code does, of what topk gives, which is contiguous."""

    def choose(self, scores):
        return scores.topk(self.top_k, dim=-1).indices.view(-1).view(-1, K)


class OneByOneInPlace(OneByOne):
    def choose(self, scores):
        first = scores.max(dim=-1, keepdim=True).indices
        scores.scatter_(-1, first, -torch.inf)
        return torch.cat([first, scores.max(dim=-1, keepdim=True).indices], dim=-1)


class WithoutGradient(OneByOne):
    def choose(self, scores):
        with torch.no_grad():
            return super().choose(scores)


class ByThreshold(Router):
    def forward(self, hidden):
        scores = self.scores(hidden)
        return scores.masked_fill(scores < scores.topk(K, dim=-1).values[..., -1:], 0)


class WithAFixedExpert(Router):
    def choose(self, scores):
        return torch.cat([super().choose(scores)[..., 1:], torch.zeros_like(scores[..., :1]).long()], dim=-1)


class Counts(Router):
    def __init__(self):
        super().__init__()
        self.load = nn.Buffer(torch.zeros(E))

    def choose(self, scores):
        index = super().choose(scores)
        self.load += torch.bincount(index.flatten(), minlength=E)
        return index


class ByToken(Router):
    def __init__(self):
        super().__init__()
        self.table = nn.Buffer(torch.stack([torch.randperm(E)[:K] for _ in range(100)]))

    def forward(self, hidden, input_ids):
        scores, index = self.scores(hidden), self.table[input_ids.reshape(-1)]
        return scores, scores.gather(1, index), index


class BySorting(Router):
    def choose(self, scores):
        return scores.sort(dim=-1, descending=True).indices[..., :K]


class Twice(Router):
    def choose(self, scores):
        return torch.maximum(super().choose(scores), super().choose(-scores))


class Fails(Router):
    def forward(self, hidden):
        raise RuntimeError("a kernel is missing")


class SaysNoK(Router):
    def __init__(self):
        super().__init__()
        del self.top_k

    def choose(self, scores):
        return scores.topk(K, dim=-1).indices


class ReadsPastItsLinear(Router):
    def __init__(self):
        super().__init__()
        del self.weight
        self.classifier = nn.Linear(H, E, bias=False)

    def scores(self, hidden):
        return F.linear(hidden.reshape(-1, H), self.classifier.weight)


class CallsItsLinear(ReadsPastItsLinear):
    def scores(self, hidden):
        return self.classifier(hidden.reshape(-1, H))


def layer_with(router: nn.Module):
    model = models.qwen3_moe()
    model.model.layers[0].mlp.gate = router
    return MoEModel.of(model).layers[0]


def test_what_is_found_of_a_router():
    found = check_router(layer_with(Router()))
    assert (found.num_experts, found.top_k, found.most_scores, found.score_dims) == (E, K, E, {2})
    assert found.is_ranked and found.has_weights and found.is_readable and found.calls_matrix
    assert not (found.may_limit or found.by_rounds or found.router_in_block or found.renormalises)


@pytest.mark.parametrize("router", [NeedsABias, TakesABiasAtWill, OfRowsAlone])
def test_other_inputs_are_zeros_in_the_shapes_that_routers_take(router):
    assert check_router(layer_with(router())).score_dims == {2}


def test_scores_may_keep_the_shape_of_the_input():
    assert check_router(layer_with(InTheShapeGiven())).score_dims == {2, 3}
    assert check_router(layer_with(OfRowsInTheirShape())).score_dims == {3}


def test_rounds_are_recognised():
    assert check_router(layer_with(OneByOne())).by_rounds


def test_a_choice_by_token_is_no_rank():
    router, calls = ByToken(), []
    router.register_forward_hook(lambda *_: calls.append(1))
    assert not check_router(layer_with(router)).is_ranked
    assert not calls, "hooks are for the model's own inputs"


@pytest.mark.parametrize("weight", ["random", "zero"])
def test_a_choice_by_other_means_is_refused_also_where_all_tokens_get_the_same(weight):
    router = BySorting()
    if weight == "zero":
        nn.init.zeros_(router.weight)
    with pytest.raises(OrdMoEModelError, match=r"mlp\.gate \(BySorting\) chose experts by 0 calls of torch\.topk"):
        check_router(layer_with(router))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (Twice, r"\(Twice\) chose experts by 2 calls"),
        (OneByOneInPlace, r"\(OneByOneInPlace\) chose experts by 0 calls"),
        (ByThreshold, r"\(ByThreshold\) gives tokens to other experts than those that it chose"),
        (WithAFixedExpert, r"\(WithAFixedExpert\) gives tokens to other experts"),
        (Fails, r"\(Fails\) cannot be run on hidden states alone: a kernel is missing"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(router, message):
    with pytest.raises(OrdMoEModelError, match=message):
        check_router(layer_with(router()))


def test_k_has_to_be_said_by_the_router_or_its_block():
    layer = layer_with(SaysNoK())
    for name in ("top_k", "num_experts_per_tok"):
        vars(layer.block).pop(name, None)
    with pytest.raises(OrdMoEModelError, match=r"\(SaysNoK\) does not say how many experts a token gets"):
        check_router(layer)
    layer.block.num_experts_per_tok = K
    assert check_router(layer).top_k == K


def test_whether_a_matrix_is_read_past_the_module_that_has_it():
    assert check_router(layer_with(CallsItsLinear())).calls_matrix
    assert not check_router(layer_with(ReadsPastItsLinear())).calls_matrix


def test_lora_within_a_router_hides_no_ranks():
    layer = layer_with(CallsItsLinear())
    wanted = check_router(layer)
    tuned = get_peft_model(layer.router, LoraConfig(target_modules=["classifier"], init_lora_weights=False))
    assert check_router(layer) == wanted
    tuned.unload()
    assert check_router(layer) == wanted


def test_a_trial_leaves_buffers_alone():
    layer = layer_with(Counts())
    check_router(layer)
    assert not layer.router.load.any()


@pytest.mark.parametrize("tier", [1, 2, [1, 2, 3]])
def test_rounds_without_gradient_leave_their_weights_one(tier):
    model = models.qwen3_moe()
    gate = model.model.layers[0].mlp.gate = WithoutGradient()
    with tier_routing(model, tier, layer_scope=[0]):
        model(torch.arange(1, 16).view(3, 5)).logits.square().sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.any()


def test_a_trial_leaves_random_numbers_and_hooks_alone():
    router, calls = Router(), []
    router.choose = lambda scores: (scores + torch.rand(1)).topk(K, dim=-1).indices
    router.register_forward_hook(lambda *_: calls.append(1))
    layer, state = layer_with(router), torch.get_rng_state()
    check_router(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls


@pytest.mark.parametrize("router", [OfRowsAlone, InTheShapeGiven, OfRowsInTheirShape, OneByOne, ViewsItsChoice])
@pytest.mark.parametrize("tier", [2, 3, [3, 1]])
def test_tiers_are_ranks_of_the_scores(router, tier):
    """In a block that gives its router rows of tokens."""
    model = models.qwen3_moe()
    gate = model.model.layers[0].mlp.gate = router()
    gate.register_forward_pre_hook(lambda module, args: (args[0].view(2, -1, H),))
    seen = []
    gate.register_forward_hook(lambda module, args, output: seen.append((args[0], output[2])))
    with tier_routing(model, tier, num_tiers=3, layer_scope=[0]), torch.no_grad():
        model(torch.arange(1, 11).view(2, 5))
    ((hidden, index_TK),) = seen
    scores_TE = F.linear(hidden.reshape(-1, H), gate.weight)
    starts = [0, 3, 6]
    tiers = [tier] * 10 if isinstance(tier, int) else [t for t in tier for _ in range(5)]
    for scores, chosen, t in zip(scores_TE, index_TK, tiers, strict=True):
        ranked = scores.argsort(descending=True).tolist()
        assert set(chosen.tolist()) == set(ranked[starts[t - 1] : starts[t - 1] + K])
