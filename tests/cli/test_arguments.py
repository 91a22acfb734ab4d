from dataclasses import fields

import pytest

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.cli.arguments import AdapterArguments, ModelArguments, help_of
from ordmoe_peft.errors import OrdMoEConfigError


@pytest.mark.parametrize(
    ("given", "wanted"), [(["all"], "all"), ("deep", "deep"), (["0", "2"], [0, 2]), ([0, 2], [0, 2]), (1, [1])]
)
def test_layers_as_options_and_recipes_give_them(given, wanted):
    assert AdapterArguments(layer_scope=given).adapter_config().layer_scope == wanted


@pytest.mark.parametrize("given", [1.5, True, None, [1.5], "middle", ["²"]])
def test_layers_that_nothing_names(given):
    with pytest.raises(OrdMoEConfigError, match="layer_scope must be one of"):
        AdapterArguments(layer_scope=given).adapter_config()


@pytest.mark.parametrize(("given", "wanted"), [("2", 2), (2, 2), ("r/K", "r/K"), (None, None)])
def test_the_rank_of_experts_as_options_and_recipes_give_it(given, wanted):
    assert AdapterArguments(expert_rank=given).adapter_config().expert_rank == wanted


def test_experts_are_selected_by_a_file_and_a_share_or_by_a_recipe(tmp_path):
    file = tmp_path / "inspect.json"
    file.write_text('{"layers": [{"layer": 0, "utilisation": [0.5, 1.5]}]}')
    for given in ({"expert_selection": str(file), "expert_share": 0.6}, {"expert_selection": {0: [1]}}):
        assert AdapterArguments(**given).adapter_config().expert_selection == {"0": [1]}
    for half in (
        {"expert_selection": str(file)},
        {"expert_share": 0.6},
        {"expert_selection": {0: [1]}, "expert_share": 1},
    ):
        with pytest.raises(OrdMoEConfigError, match="Give both, or none"):
            AdapterArguments(**half).adapter_config()


def test_options_of_the_adapter_default_to_its_configuration():
    options, config = AdapterArguments(), OrdMoEConfig()
    others = ("lora_r", "lora_alpha", "layer_scope", "expert_share")
    own = [item.name for item in fields(AdapterArguments) if item.name not in others]
    assert {name: getattr(options, name) for name in own} == {name: getattr(config, name) for name in own}
    assert help_of(AdapterArguments, "grouping") == help_of(OrdMoEConfig, "grouping")


def test_experts_in_ram_are_in_4_bits():
    assert ModelArguments("base", load_in_4bit=True, offload_experts=True).quantization_config().offload_experts
    assert not ModelArguments("base", load_in_4bit=True).quantization_config().offload_experts
    with pytest.raises(OrdMoEConfigError, match="offload_experts=True .* set load_in_4bit=True"):
        ModelArguments("base", offload_experts=True).quantization_config()


def test_a_run_may_go_on_with_experts_elsewhere():
    on_device, in_ram = (ModelArguments("base", load_in_4bit=True, offload_experts=given) for given in (False, True))
    assert on_device.that_decide() == in_ram.that_decide()
    assert {item.name for item in fields(ModelArguments)} - set(in_ram.that_decide()) == {"offload_experts"}
