"""What is chosen to be packed, by name and shape alone."""

import pytest
from torch import nn

from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.selection import (
    expert_linears,
    expert_stacks,
    is_of_router,
    linear_block_size,
    skips_nothing,
    stack_readers,
    unquantised_linears,
)
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject


@pytest.mark.parametrize(
    ("in_features", "largest", "wanted"), [(256, 64, 64), (256, 4096, 256), (192, 256, 64), (96, 64, 0), (40, 64, 0)]
)
def test_a_linear_takes_the_largest_block_that_divides_its_rows(in_features, largest, wanted):
    assert linear_block_size(in_features, largest) == wanted


def test_stacks_are_skipped_by_name_module_and_parent():
    model = models.qwen3_moe()
    readers = stack_readers(MoEModel.of(model).all_layers)
    everything = expert_stacks(model, readers, None)
    assert len(everything) == 2 * models.NUM_LAYERS
    assert everything - expert_stacks(model, readers, ["model.layers.0"]) == {
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }
    assert all(name.endswith("gate_up_proj") for name in expert_stacks(model, readers, ["experts.down_proj"]))


def layers_of(row_name):
    row = next(row for row in installed_rows() if row.name.startswith(row_name))
    model = Subject(row).model
    return model, MoEModel.of(model).all_layers


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("Dbrx", {"transformer.blocks.0.ffn.experts": {"mlp.w1", "mlp.v1", "mlp.w2"}}),
        (
            "JetMoe",
            {
                f"model.layers.0.{block}.{name}": {"weight"}
                for block in ("mlp", "self_attention.experts")
                for name in ("input_linear", "output_linear")
            },
        ),
        (
            "InklingForCausalLM",
            {
                "model.layers.0.mlp.experts": {"gate_up_proj", "down_proj"},
                "model.layers.0.mlp.shared_experts": {"gate_proj", "up_proj", "down_proj"},
            },
        ),
    ],
)
def test_stacks_are_read_by_the_blocks_child_that_holds_them(row, wanted):
    found: dict[str, set[str]] = {}
    for name, reader in stack_readers(layers_of(row)[1]).items():
        if ".0." in name:
            found.setdefault(reader, set()).add(name.removeprefix(f"{reader}."))
    assert found == wanted


def test_a_container_is_read_by_its_block():
    model, layers = layers_of("Llama4ForCausalLM")
    block = layers[0].block
    block.experts = nn.ParameterDict(dict(block.experts.named_parameters()))
    block.num_local_experts = model.config.num_local_experts
    readers = stack_readers(MoEModel.of(model).all_layers)
    assert {reader for name, reader in readers.items() if ".0." in name} == {"model.layers.0.feed_forward"}


def test_shared_stacks_can_be_skipped():
    model, layers = layers_of("InklingForCausalLM")
    stacks = expert_stacks(model, stack_readers(layers), ["shared_experts"])
    assert {name.split(".")[-2] for name in stacks} == {"experts"}


def test_linear_layers_of_experts_are_chosen_by_name_and_rows():
    model, layers = layers_of("Switch")
    chosen = expert_linears(layers, ["encoder", "expert_1", r".*expert_[2-7]"])
    kept = unquantised_linears(model, layers, ["encoder", "expert_1", r".*expert_[2-7]"])
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear and ".experts." in name}
    assert {name for name in kept if ".experts." in name} == linears - chosen
    assert {".".join(name.split(".")[-2:]) for name in chosen} == {"expert_0.wi", "expert_0.wo"}
    expert = layers[0].experts["expert_0"]
    expert.wi = nn.Linear(40, 64)
    assert expert_linears(layers[:1], ["expert_1", r".*expert_[2-7]"]) == {f"{layers[0].experts_name}.expert_0.wo"}


def test_names_to_skip_that_name_nothing_are_found():
    assert skips_nothing(models.qwen3_moe(), ["model.layers.1", "experts", "layer.1"]) == ["layer.1"]
    assert skips_nothing(models.qwen3_moe(), None) == []


def test_routers_gates_and_heads_stay_as_they_are():
    model = models.qwen2_moe()
    layers = MoEModel.of(model).layers
    kept = unquantised_linears(model, layers, None)
    assert "lm_head" in kept
    assert {name for name in kept if name.endswith("shared_expert_gate")} == {
        f"model.layers.{layer}.mlp.shared_expert_gate" for layer in range(models.NUM_LAYERS)
    }
    assert not any(".self_attn." in name for name in kept)
    router = layers[0].router_name
    assert is_of_router(router, model.get_submodule(router), layers[0])
    assert not is_of_router(router, model.get_submodule(router), layers[1])
