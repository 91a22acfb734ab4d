"""What is taken for a MoE layer and what is not, by the names and shapes of what modules hold."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.layer_search import find_layers, stated_top_k
from ordmoe_peft.moe_model import MoEModel
from tests import models


E, H, F = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))

    def forward(self, x):
        return (x @ self.weight.T).softmax(-1)


class ListOfExperts(nn.Module):
    """A linear layer that routes, and a list of experts, all of which run."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, F), nn.SiLU(), nn.Linear(F, H)) for _ in range(E))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts))


class Stacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(E, F, H)), nn.Parameter(torch.randn(E, H, F))

    def forward(self, x, weights):
        return torch.einsum("...e,efh,egf,...h->...g", weights, self.w1, self.w2, x) * 0.01


class RouterFurtherDown(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Sequential(Router())
        self.experts = Stacks()

    def forward(self, x):
        return self.experts(x, self.router(x))


class StacksInTheBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, H, F)), nn.Parameter(torch.randn(E, F, H))

    def forward(self, x):
        return x * self.gate(x).mean()


class PairOfStacks(nn.Module):
    """As JetMoE has it: a module for each projection."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.gate = nn.Module(), nn.Module(), Router()
        self.up.weight, self.down.weight = nn.Parameter(torch.randn(E, F, H)), nn.Parameter(torch.randn(E, H, F))
        self.up.num_experts = self.down.num_experts = E

    def forward(self, x):
        return x * self.gate(x).mean()


class FlatStacks(nn.Module):
    """As DBRX has it: all experts of a projection in one matrix, one module further down."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(), nn.Module()
        self.experts.mlp = nn.Module()
        self.experts.mlp.moe_num_experts = E
        self.experts.mlp.w1, self.experts.mlp.w2 = (nn.Parameter(torch.randn(E * F, H)) for _ in range(2))

    def forward(self, x):
        return x * self.router(x).mean()


class RoutesItself(nn.Module):
    """The router's matrix is a parameter of the block."""

    def __init__(self):
        super().__init__()
        self.gate_weight = nn.Parameter(torch.randn(E, H))
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

    def forward(self, x):
        return x


BLOCK = "model.layers.1.mlp"
FOUND = {
    ListOfExperts: ("modules", f"{BLOCK}.experts", (), "gate", "weight"),
    RouterFurtherDown: ("stacks", f"{BLOCK}.experts", ("w1", "w2"), "router", "0.weight"),
    StacksInTheBlock: ("stacks", BLOCK, ("up", "down"), "gate", "weight"),
    PairOfStacks: ("stacks", BLOCK, ("up.weight", "down.weight"), "gate", "weight"),
    FlatStacks: ("flat", f"{BLOCK}.experts", ("mlp.w1", "mlp.w2"), "router", "weight"),
    RoutesItself: ("modules", f"{BLOCK}.experts", (), "", ""),
}


def with_block(block) -> nn.Module:
    """The second of three layers has it."""
    model = models.qwen3_moe()
    model.model.layers[1].mlp = block()
    return model


@pytest.mark.parametrize("block", FOUND)
def test_layers_are_found_by_what_they_hold(block):
    kind, experts, stacks, router, matrix = FOUND[block]
    found = list(find_layers(with_block(block)))
    assert [layer.block for layer in found] == [f"model.layers.{index}.mlp" for index in range(3)]
    assert (found[1].kind, found[1].experts, found[1].stacks) == (kind, experts, stacks)
    assert (found[1].router.removeprefix(f"{BLOCK}."), found[1].router_matrix) == (router, matrix)
    assert found[1].num_experts == E


@pytest.mark.parametrize("block", FOUND)
def test_a_layer_without_a_choice_of_k_is_refused_where_it_is_in_scope_alone(block):
    model = with_block(block)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(OrdMoEModelError, match=r"model\.layers\.1\.mlp"), tier_routing(model, 2):
        pass
    with pytest.raises(OrdMoEModelError, match=r"model\.layers\.1\.mlp"):
        get_peft_model(model, OrdMoEConfig(targets=["attention"]))
    assert [name for name, _ in model.named_modules()] == names
    tuned = get_peft_model(model, OrdMoEConfig(targets=["attention"], layer_scope=[0, 2]))
    plain = tuned(**models.text_batch()).logits
    with tier_routing(tuned, 3):
        assert not torch.equal(tuned(**models.text_batch()).logits, plain)


def test_wrapped_layers_are_found_as_before():
    model = models.mixtral()
    before = list(find_layers(model))
    tuned = get_peft_model(model, OrdMoEConfig(r=4))
    assert list(find_layers(tuned.base_model.model)) == before
    assert MoEModel.of(tuned).layers[0].router_weight is MoEModel.of(model).layers[0].router_weight


def lists_that_are_no_experts() -> nn.Module:
    """As many modules as a matrix has rows, of other widths."""
    block = nn.Module()
    block.gate, block.parts = nn.Linear(H, E), nn.ModuleList(nn.Linear(F, F) for _ in range(E))
    return block


def heads_that_all_run() -> nn.Module:
    """With as many outputs each as there are of them, so that the first has the shape of a router."""
    block = nn.Module()
    block.heads, block.out = nn.ModuleList(nn.Linear(H, E) for _ in range(E)), nn.Linear(E * E, H)
    return block


def convolution() -> nn.Module:
    """A kernel of one is a stack of columns."""
    block = nn.Module()
    block.first, block.second = nn.Conv1d(H, H, 1), nn.Linear(H, H)
    return block


def block_diagonal_gates() -> nn.Module:
    """As a recurrent layer has them (RecurrentGemma): a matrix for each head, and a bias for each."""
    block = nn.Module()
    block.a, block.b = (nn.Parameter(torch.randn(E, F, F)) for _ in range(2))
    block.a_bias, block.b_bias = (nn.Parameter(torch.randn(E, F)) for _ in range(2))
    return block


@pytest.mark.parametrize("block", [lists_that_are_no_experts, heads_that_all_run, convolution, block_diagonal_gates])
def test_what_is_no_layer(block):
    assert [layer.block for layer in find_layers(with_block(block))] == ["model.layers.0.mlp", "model.layers.2.mlp"]


def test_k_is_that_of_the_router_then_of_its_configuration_then_of_the_block():
    class Named(nn.Module):
        pass

    router, block = Named(), Named()
    assert stated_top_k(router, block, None) == 0
    block.top_k = 4
    assert stated_top_k(router, block) == 4
    router.config = type("Config", (), {"moe_topk": [3, 3], "top_k_experts": 3})()
    assert stated_top_k(router, block) == 3
    router.top_k = 2
    assert stated_top_k(router, block) == 2


class Experts(nn.Module):
    """A block of K = 2 of E experts, as remote code has it: the block chooses."""

    def __init__(self, experts: list[nn.Module] | None = None):
        super().__init__()
        self.gate, self.top_k = nn.Linear(H, E, bias=False), 2
        self.experts = nn.ModuleList(experts or [nn.Linear(H, H) for _ in range(E)])

    def scores(self, x):
        return self.gate(x)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, H)
        weights, index = self.scores(x).softmax(-1).topk(self.top_k, dim=-1)
        rows = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, H))
        return (weights.unsqueeze(-1) * chosen).sum(1).view_as(hidden_states)


def test_a_list_beside_a_block_does_not_make_the_block_a_router():
    model = with_block(Experts)
    model.model.layers[1].heads = nn.ModuleList(nn.Linear(H, H) for _ in range(E))
    found = [layer for layer in find_layers(model) if layer.block.startswith("model.layers.1")]
    assert [(layer.block, layer.router) for layer in found] == [(BLOCK, f"{BLOCK}.gate")]


def test_members_without_matrices_count():
    block = Experts([*(nn.Linear(H, H) for _ in range(E - 2)), nn.Identity(), nn.Identity()])
    assert list(find_layers(with_block(lambda: block)))[1].num_experts == E


def with_two_gates() -> nn.Module:
    block = Experts()
    block.other_gate = nn.Linear(H, E, bias=False)
    return block


def with_noise() -> nn.Module:
    block = Experts()
    block.gate = nn.ModuleDict({"scores": nn.Linear(H, E), "noise": nn.Linear(H, E)})
    return block


def with_a_list_for_each_projection() -> nn.Module:
    block = Experts()
    block.more_experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))
    return block


@pytest.mark.parametrize("block", [with_two_gates, with_noise, with_a_list_for_each_projection])
def test_what_might_be_several_routers_is_refused_by_name(block):
    model = with_block(block)
    with pytest.raises(OrdMoEModelError, match=r"mlp has experts but no router .* or several"), tier_routing(model, 2):
        pass


def test_experts_that_layers_share_are_of_both_and_take_no_lora():
    model = models.qwen3_moe()
    first, second = Experts(), Experts()
    second.experts = first.experts
    model.model.layers[1].mlp, model.model.layers[2].mlp = first, second
    assert [layer.kind for layer in find_layers(model)] == ["fused", "modules", "modules"]
    with pytest.raises(OrdMoEModelError, match=r"layers\.1\.mlp\.experts\.0 and .*layers\.2.* one and the same module"):
        get_peft_model(model, OrdMoEConfig(targets=["experts"]))


class ReadsItsGate(Experts):
    def scores(self, x):
        return nn.functional.linear(x.float(), self.gate.weight.float())


class ReadsItsExperts(Experts):
    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, H)
        weights, index = self.scores(x).softmax(-1).topk(self.top_k, dim=-1)
        rows = torch.einsum("th,eoh->teo", x, torch.stack([expert.weight for expert in self.experts]))
        chosen = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, H))
        return (weights.unsqueeze(-1) * chosen).sum(1).view_as(hidden_states)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("block", "role", "message"),
    [
        (ReadsItsGate, "router", r"mlp\.gate \(Linear\) or its block reads weight itself"),
        (ReadsItsExperts, "experts", r"mlp reads the weights of the experts in .* does not call them"),
        (lambda: Experts([Scaled(H, H) for _ in range(E)]), "experts", r"have 0\.weight, which is of no nn\.Linear"),
    ],
    ids=["gate", "experts", "subclass"],
)
def test_lora_that_would_do_nothing_or_other_than_it_says_is_refused(block, role, message):
    with pytest.raises(OrdMoEModelError, match=message):
        get_peft_model(with_block(block), OrdMoEConfig(targets=[role]))


def test_lora_on_what_is_called_is_not_refused():
    tuned = get_peft_model(with_block(Experts), OrdMoEConfig(r=4))
    names = [name for name, _ in tuned.named_parameters() if "lora_A" in name and "layers.1.mlp" in name]
    assert len(names) == 1 + E
