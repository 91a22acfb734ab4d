import pytest
import torch
from peft import get_peft_model
from torch import nn

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, coverage_report, quantize_experts_, tier_routing
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from tests import models
from tests.quantization import families


E, H, F = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))

    def forward(self, x):
        return (x @ self.weight.T).softmax(-1)


class ListOfExperts(nn.Module):
    """As remote code has it: a linear layer that routes, and a list of experts."""

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
        return torch.einsum("...e,efh,ehg,...h->...g", weights, self.w1, self.w2.mT, x) * 0.01


class Undecorated(nn.Module):
    """Fused experts of a class without flags, and a router one module further down."""

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


BLOCKS = [ListOfExperts, Undecorated, StacksInTheBlock]


def half_covered(block=ListOfExperts):
    """The first of three layers is served."""
    model = models.qwen3_moe()
    for layer in model.model.layers[1:]:
        layer.mlp = block()
    return model


NAMES = ["model.layers.1.mlp", "model.layers.2.mlp"]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_found_by_what_they_hold(block):
    model = half_covered(block)
    assert MoEModel.of(model).unserved_blocks == NAMES
    config = OrdMoEConfig(targets=["attention"], layer_scope=[0])
    tuned = get_peft_model(model, config)
    assert coverage_report(tuned).unserved == [f"base_model.model.{name}" for name in NAMES]
    assert "model.layers.2.mlp: its experts are not of transformers'" in str(coverage_report(tuned))


@pytest.mark.parametrize(
    "build",
    [
        *models.FAMILIES.values(),
        *(models.gpt_oss, models.openai_privacy_filter, models.nemotron_h, models.qwen2_moe),
        *(families.afmoe, families.gemma4, families.hunyuan_v1_moe),
        lambda: models.deepseek_v3(first_k_dense_replace=1),
    ],
)
def test_models_of_transformers_have_none(build):
    assert MoEModel.of(build()).unserved_blocks == []


def test_lists_that_are_no_experts():
    model = models.qwen3_moe()
    heads = nn.Module()  # as many modules as a matrix has rows, of other widths
    heads.gate, heads.parts = nn.Linear(H, E), nn.ModuleList(nn.Linear(F, F) for _ in range(E))
    convolution = nn.Module()  # a kernel of one is a stack of columns
    convolution.first, convolution.second = nn.Conv1d(H, H, 1), nn.Linear(H, H)
    model.model.layers[1].mlp, model.model.layers[2].mlp = heads, convolution
    assert MoEModel.of(model).unserved_blocks == []


@pytest.mark.parametrize("targets", [["router"], ["experts"], ["experts", "attention"]])
def test_roles_that_would_cover_part_of_the_layers_are_refused(targets):
    model = half_covered()
    with pytest.raises(OrdMoEModelError, match=r"cannot cover all MoE layers.*model.layers.1.mlp, model.layers.2.mlp"):
        get_peft_model(model, OrdMoEConfig(targets=targets, layer_scope=[0]))
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("scope", ["all", "shallow", "deep"])
def test_scopes_that_count_all_layers_are_refused(scope):
    model = half_covered()
    with pytest.raises(OrdMoEModelError, match=f"layer_scope='{scope}' cannot cover all MoE layers"):
        get_peft_model(model, OrdMoEConfig(targets=["attention"], layer_scope=scope))
    with pytest.raises(OrdMoEModelError, match="layer_scope"), tier_routing(model, 2, layer_scope=scope):
        pass


def test_a_list_of_layers_and_no_tiers_are_allowed():
    batch = models.text_batch()
    get_peft_model(half_covered(), OrdMoEConfig(targets=["attention"], num_tiers=1))(**batch)
    model = half_covered()
    top = model(**batch).logits
    with tier_routing(model, 2, layer_scope=[0]):
        assert not torch.equal(model(**batch).logits, top)


@pytest.mark.parametrize("block", BLOCKS)
def test_four_bits_are_refused_unless_the_blocks_are_skipped(block, tmp_path):
    model = half_covered(block)
    with pytest.raises(OrdMoEModelError, match=r"in model.layers.1.mlp \(\w+\) cannot be packed in 4 bits"):
        quantize_experts_(model)
    assert not hasattr(model, "hf_quantizer")
    quantize_experts_(model, MoeBitsAndBytesConfig(llm_int8_skip_modules=NAMES))
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.uint8
