"""Models of which some decoder layers have a Mixture of Experts: which ones is what their configurations say."""

from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model
from torch import nn

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.moe_model import MoEModel
from tests.families import tiny
from tests.families.rows import NEMOTRON
from tests.families.test_inputs import adapted_parts


def after(field: str) -> Callable[[Any, int], bool]:
    """Layers from the one that `field` counts to."""
    return lambda config, index: index >= getattr(config, field)


def every_nth(config, index: int) -> bool:
    """Qwen's rule, which layers named as dense are exempt from."""
    return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0


def every_nth_between(config, index: int) -> bool:
    """ERNIE's rule."""
    is_between = config.moe_layer_start_index <= index <= config.moe_layer_end_index
    return is_between and (index + 1) % config.moe_layer_interval == 0


# Class → (changes of its tiny configuration, whether a layer is to have a MoE, the layers that this comes to).
MIXED = {
    "Qwen3MoeForCausalLM": ({"num_hidden_layers": 6, "decoder_sparse_step": 2}, every_nth, [1, 3, 5]),
    "Qwen3MoeForCausalLM-dense": (
        {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
        every_nth,
        [1, 5],
    ),
    "JambaForCausalLM": (
        {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1}
        | {"expert_layer_period": 3, "expert_layer_offset": 2},
        lambda config, index: index % config.expert_layer_period == config.expert_layer_offset,
        [2, 5],
    ),
    "GraniteMoeHybridForCausalLM": (
        {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]},
        lambda config, index: True,
        [0, 1, 2, 3],
    ),
    "NemotronHForCausalLM": (
        NEMOTRON
        | {"num_hidden_layers": 6}
        | {"layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe", "moe"]},
        lambda config, index: config.layers_block_type[index] == "moe",
        [1, 4, 5],
    ),
    "Qwen3NextForCausalLM": (
        {"num_hidden_layers": 4, "mlp_only_layers": [1]}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]},
        every_nth,
        [0, 2, 3],
    ),
    "BailingHybridForCausalLM": (
        {"num_hidden_layers": 4, "first_k_dense_replace": 2, "mlp_layer_types": None},
        after("first_k_dense_replace"),
        [2, 3],
    ),
    "Lfm2MoeForCausalLM": (
        {"num_hidden_layers": 4, "num_dense_layers": 2, "layer_types": ["conv", "full_attention", "conv", "conv"]},
        after("num_dense_layers"),
        [2, 3],
    ),
    "DeepseekV3ForCausalLM": (
        {"num_hidden_layers": 4, "first_k_dense_replace": 2},
        after("first_k_dense_replace"),
        [2, 3],
    ),
    "Ernie4_5_MoeForCausalLM": (
        {"num_hidden_layers": 7, "moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 5},
        every_nth_between,
        [3, 5],
    ),
}


@pytest.fixture(params=MIXED, scope="module")
def mixed(request) -> tuple[nn.Module, list[int]]:
    """A model and the decoder layers that are to have a MoE."""
    changes, is_moe, layers = MIXED[request.param]
    model_class = tiny.class_named(request.param.partition("-")[0])
    model = tiny.tiny_model(model_class, tiny.tiny_config(model_class.config_class, changes))
    by_rule = [index for index in range(model.config.num_hidden_layers) if is_moe(model.config, index)]
    assert by_rule == layers
    return model, layers


def test_moe_layers_are_those_of_the_configuration(mixed):
    model, layers = mixed
    assert [layer.decoder_layer for layer in MoEModel.of(model).layers] == layers
    (decoder,) = MoEModel.of(model).text_models
    assert len(decoder.layers) == model.config.num_hidden_layers


def test_an_adapter_is_on_the_experts_of_these_layers_and_on_no_shared_ones(mixed):
    model, layers = mixed
    adapted = adapted_parts(get_peft_model(model, OrdMoEConfig(r=4, targets=["router", "experts"])))
    assert {int(name.partition(".layers.")[2].partition(".")[0]) for name in adapted} == set(layers)
    assert not any("shared" in name for name in adapted)
