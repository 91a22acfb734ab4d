import pytest

from ordmoe_peft.cli.arguments import AdapterArguments
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
