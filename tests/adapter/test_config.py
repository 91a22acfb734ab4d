import json

import pytest

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEConfigError


def test_defaults_are_the_methods():
    config = OrdMoEConfig()
    assert (config.num_tiers, config.grouping, config.layer_scope, config.advantages) == (
        3,
        "uniform",
        "all",
        "zscore",
    )
    assert config.targets == ["router", "experts"]
    assert config.peft_type == "ORDMOE"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["routers"]}, r"targets must be .*got \['routers'\]"),
        ({"targets": []}, "targets must be"),
        ({"targets": 3}, "targets must be a list, each a string, got 3"),
        ({"num_tiers": "3"}, "num_tiers must be a whole number, got '3'"),
        ({"num_tiers": True}, "num_tiers must be a whole number, got True"),
        ({"num_tiers": 10**9}, "num_tiers must be at most 4096, got 1000000000"),
        ({"rewards": 3}, "rewards must be a list, each a finite number or None, got 3"),
        ({"rewards": [1, float("nan"), 0]}, r"rewards must be .*finite number or None, got \[1, nan, 0\]"),
        ({"layer_scope": 1.5}, "layer_scope must be a string or a list, each a whole number, got 1.5"),
        ({"tier_seed": "a"}, "tier_seed must be a whole number, got 'a'"),
        ({"tier_seed": 2**63}, "tier_seed must be a whole number of 64 bits, got 9223372036854775808"),
        ({"tier_seed": -(2**63) - 1}, "tier_seed must be a whole number of 64 bits"),
        ({"num_tiers": 0}, "num_tiers must be at least 1, got 0"),
        ({"grouping": "best"}, "grouping must be one of .*'best'"),
        ({"advantages": "rank"}, "advantages must be one of .*'rank'"),
        ({"layer_scope": "middle"}, "layer_scope must be one of .*'middle'"),
        ({"rewards": [1, 0]}, r"3 tiers, got \[1, 0\]"),
        ({"rewards": [0, 0.5, 1]}, "not rise"),
        ({"targets": ["experts.q_proj"]}, r"targets must be .*'experts.down'.*got \['experts.q_proj'\]"),
        ({"targets": ["experts", "experts.down"]}, "has 'experts', which is all of their projections, and one of"),
        ({"targets": ["experts.down"], "lora_dropout": 0.1}, "lora_dropout=0.1 cannot be applied"),
        ({"expert_rank": 0}, "expert_rank must be at least 1, or 'r/K', got 0"),
        ({"expert_rank": "r / K"}, "expert_rank must be at least 1, or 'r/K', got 'r / K'"),
        ({"expert_rank": 2.0}, "expert_rank must be a whole number or a string or None, got 2.0"),
        (
            {"expert_rank": 2, "targets": ["router"]},
            r"expert_rank=2 is for experts, which targets=\['router'\] has not",
        ),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"use_dora": True}, "use_dora=True"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] has no effect"),
        ({"exclude_modules": ["gate"]}, "exclude_modules={'gate'} has no effect"),
    ],
)
def test_bad_values_are_refused_with_the_value(arguments, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        OrdMoEConfig(**arguments)


def test_errors_are_value_errors():
    with pytest.raises(ValueError):
        OrdMoEConfig(num_tiers=0)


def test_dropout_is_allowed_where_it_can_be_applied():
    assert OrdMoEConfig(targets=["attention"], lora_dropout=0.1).lora_dropout == 0.1


def test_a_configuration_of_an_older_version_loads(tmp_path):
    """Without fields that came later, and with lists where tuples were given."""
    saved = {
        "peft_type": "ORDMOE",
        "num_tiers": 3,
        "r": 8,
        "lora_alpha": 8,
        "layer_scope": [0, 2],
        "rewards": [1, 0.5, 0],
        "targets": ["router"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    config = OrdMoEConfig.from_pretrained(tmp_path)
    assert (config.layer_scope, config.rewards, config.targets) == ([0, 2], [1, 0.5, 0], ["router"])
    assert config.tier_weights == "router"
