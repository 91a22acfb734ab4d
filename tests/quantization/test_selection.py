"""What is chosen to be packed, by name and shape alone."""

import pytest

from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.selection import (
    expert_stacks,
    is_of_router,
    linear_block_size,
    skips_nothing,
    unquantised_linears,
)
from tests import models


@pytest.mark.parametrize(
    ("in_features", "largest", "wanted"), [(256, 64, 64), (256, 4096, 256), (192, 256, 64), (96, 64, 0), (40, 64, 0)]
)
def test_a_linear_takes_the_largest_block_that_divides_its_rows(in_features, largest, wanted):
    assert linear_block_size(in_features, largest) == wanted


def test_stacks_are_skipped_by_name_module_and_parent():
    layers = MoEModel.of(models.qwen3_moe()).layers
    everything = expert_stacks(layers, None)
    assert len(everything) == 2 * models.NUM_LAYERS
    assert everything - expert_stacks(layers, ["model.layers.0"]) == {
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }
    assert all(name.endswith("gate_up_proj") for name in expert_stacks(layers, ["experts.down_proj"]))


def test_names_to_skip_that_name_nothing_are_found():
    assert skips_nothing(models.qwen3_moe(), ["model.layers.1", "experts", "layer.1"]) == ["layer.1"]
    assert skips_nothing(models.qwen3_moe(), None) == []


def test_routers_gates_and_heads_stay_as_they_are():
    model = models.qwen2_moe()
    layers = MoEModel.of(model).layers
    kept = unquantised_linears(model, layers)
    assert "lm_head" in kept
    assert {name for name in kept if name.endswith("shared_expert_gate")} == {
        f"model.layers.{layer}.mlp.shared_expert_gate" for layer in range(models.NUM_LAYERS)
    }
    assert not any(".self_attn." in name for name in kept)
    router = layers[0].router_name
    assert is_of_router(router, model.get_submodule(router), layers[0])
    assert not is_of_router(router, model.get_submodule(router), layers[1])
