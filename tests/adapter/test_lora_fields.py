import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.lora_fields import resolve_patterns
from ordmoe_peft.adapter.targets import Target
from ordmoe_peft.errors import OrdMoEConfigError
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
