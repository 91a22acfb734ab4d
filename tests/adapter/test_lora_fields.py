import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.lora_fields import expert_rank_of, in_few_patterns, resolve_patterns
from ordmoe_peft.adapter.targets import Target
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models


FROM_WEIGHTS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "corda", "lora_ga", "eva", "loftq", "mica", "no_such"]


@pytest.mark.parametrize("initialisation", FROM_WEIGHTS)
@pytest.mark.parametrize("role", ["router", "experts"])
def test_initialisations_from_the_weights_are_refused_for_parameters(initialisation, role):
    with pytest.raises(OrdMoEConfigError, match=f"init_lora_weights='{initialisation}' cannot be applied to routers"):
        OrdMoEConfig(targets=[role, "attention"], init_lora_weights=initialisation)


@pytest.mark.parametrize("initialisation", [True, False, "gaussian"])
def test_initialisations_that_parameters_can_have(initialisation):
    tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, init_lora_weights=initialisation))
    factors = [p for name, p in tuned.named_parameters() if "lora_B" in name]
    assert all(bool(p.any()) == (initialisation is False) for p in factors)


@pytest.mark.parametrize("initialisation", ["pissa", "olora", "orthogonal", "mica"])
def test_attention_is_initialised_as_by_peft(initialisation):
    def logits(config):
        torch.manual_seed(0)
        return get_peft_model(models.qwen3_moe(), config)(**models.text_batch()).logits

    mine = logits(OrdMoEConfig(r=4, targets=["attention"], init_lora_weights=initialisation))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    wanted = logits(LoraConfig(r=4, target_modules=projections, init_lora_weights=initialisation))
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"velora_config": {}},
        {"kasa_config": {}},
        {"monteclora_config": {}},
        {"use_bdlora": {}},
        {"arrow_config": {}},
        {"alora_invocation_tokens": [1]},
        {"eva_config": {}},
        {"corda_config": {}},
        {"lora_ga_config": {}},
        {"loftq_config": {"loftq_bits": 4}},
    ],
)
def test_settings_that_parameters_cannot_have_are_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(OrdMoEConfigError, match=f"{name}=.* cannot be applied to routers and fused experts"):
        OrdMoEConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"fan_in_fan_out": True}, {"megatron_config": {"x": 1}}, {"use_qalora": True}, {"exclude_modules": "q"}],
)
def test_settings_that_nothing_can_have_are_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(OrdMoEConfigError, match=f"{name}="):
        OrdMoEConfig(targets=["attention"], **settings)


def ranks(tuned):
    """The rank of each adapted thing of the first layer, in the names of PEFT's keys."""
    return {
        f"{name.rpartition('.')[2]}.{getattr(module, 'parameter_name', '')}": (
            module.r["default"],
            module.lora_alpha["default"],
        )
        for name, module in tuned.base_model.model.model.layers[0].named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"mlp.experts": 2}, {"gate_up_proj": 2, "down_proj": 2}),
        ({"mlp.gate": 3}, {"weight": 3}),
        ({"down_proj": 3}, {"down_proj": 3}),
        ({"mlp.experts.gate_up_proj": 3, "mlp.experts": 2}, {"gate_up_proj": 3, "down_proj": 2}),
        ({"mlp.experts": 2, "gate_up_proj": 3}, {"gate_up_proj": 3, "down_proj": 2}),
        ({r"layers\.0\.mlp\.(experts|gate)": 2}, {"gate_up_proj": 2, "down_proj": 2, "weight": 2}),
    ],
)
def test_patterns_by_module_and_by_parameter(patterns, expected, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*_pattern")
        settings = {"r": 4, "lora_alpha": 6, "rank_pattern": patterns, "alpha_pattern": patterns}
        tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(**settings))
    everything = {"gate_up_proj": (4, 6), "down_proj": (4, 6), "weight": (4, 6)}
    wanted = everything | {name: (value, value) for name, value in expected.items()}
    assert {name.rpartition(".")[2]: value for name, value in ranks(tuned).items()} == wanted

    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path)
    assert ranks(loaded) == ranks(tuned)
    assert torch.equal(loaded(**models.text_batch()).logits, tuned.eval()(**models.text_batch()).logits)


def test_patterns_are_resolved_by_names_alone():
    targets = [
        Target("router", "router", "layers.0.mlp.gate.weight", True, 0),
        Target("attention", "attention", "layers.0.attn.q_proj", False, 0),
    ]
    assert resolve_patterns("rank_pattern", {"mlp.gate": 2, "q_proj": 3}, targets) == {
        "layers.0.mlp.gate.weight": 2,
        "layers.0.attn.q_proj": 3,
    }
    with pytest.raises(OrdMoEConfigError, match=r"alpha_pattern has 'k_proj'.*layers.0.attn.q_proj"):
        resolve_patterns("alpha_pattern", {"k_proj": 3}, targets)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"expert_rank": 2}, 2),
        ({"expert_rank": "r/K"}, 3),  # of 5 / 2, rounded up
        ({"expert_rank": "r/K", "rank_pattern": {"mlp.gate": 7, "down_proj": 3}}, 3),
    ],
)
def test_experts_have_a_rank_of_their_own(settings, rank, tmp_path):
    tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=5, lora_alpha=6, **settings))
    of_router = 7 if "rank_pattern" in settings else 5
    assert {name.rpartition(".")[2]: value for name, value in ranks(tuned).items()} == {
        **{"gate_up_proj": (rank, 6), "down_proj": (rank, 6), "weight": (of_router, 6)}
    }
    assert tuned.base_model.model.model.layers[0].mlp.experts.scaling["default"] == 6 / rank  # PEFT's rule
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["expert_rank"] == rank
    assert f"LoRA of rank 5 ({rank} on experts)" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path)
    assert ranks(loaded) == ranks(tuned)
    assert torch.equal(loaded(**models.text_batch()).logits, tuned.eval()(**models.text_batch()).logits)


def test_a_rank_of_experts_that_is_said_twice_or_not_known():
    config = OrdMoEConfig(r=4, expert_rank="r/K", rank_pattern={"down_proj": 3})
    with pytest.raises(
        OrdMoEConfigError, match=r"expert_rank stands for 2, and rank_pattern gives .*down_proj the rank 3"
    ):
        get_peft_model(models.qwen3_moe(), config)
    for top_ks in ([2, 4], [0]):
        layers = [SimpleNamespace(top_k=top_k) for top_k in top_ks]
        with pytest.raises(OrdMoEModelError, match=rf"expert_rank='r/K' needs one K .* have \[{top_ks[0]}"):
            expert_rank_of(OrdMoEConfig(expert_rank="r/K"), layers)
        assert expert_rank_of(OrdMoEConfig(expert_rank=3), layers) == 3


def test_experts_that_are_modules_share_a_pattern():
    """PEFT tries each pattern on each module; its own rule finds the same ranks with fewer."""
    of_experts = [
        Target("experts", name, f"layers.{layer}.mlp.experts.{expert}.{name}", False, layer)
        for layer in range(2)
        for expert in range(12)
        for name in ("w1", "w2")
    ]
    router = Target("router", "router", "layers.0.mlp.gate", False, 0)
    by_name = {target.name: 2 for target in of_experts} | {router.name: 9, "layers.1.mlp.experts.3.w2": 4}
    few = in_few_patterns(by_name, [router, *of_experts])
    assert len(few) == 1 + 3 + 12  # the router; both of layer 0, and w1 of layer 1; w2 of layer 1 has two ranks
    assert {name: few[get_pattern_key(few, name)] for name in by_name} == by_name
