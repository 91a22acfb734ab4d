import pytest
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import find_moe_layers, text_models
from tests import models


def test_layers_are_found_with_their_sizes(model):
    layers = find_moe_layers(model)
    assert [(layer.index, layer.decoder_layer) for layer in layers] == [(i, i) for i in range(models.NUM_LAYERS)]
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(models.NUM_EXPERTS, models.TOP_K)}
    assert {layer.projections for layer in layers} == {("gate_up_proj", "down_proj")}
    assert text_models(model, layers) == {model.get_decoder(): layers}


def test_dense_layers_between_are_passed_over():
    model = models.qwen3_moe(mlp_only_layers=[1], intermediate_size=40)
    assert [(layer.index, layer.decoder_layer) for layer in find_moe_layers(model)] == [(0, 0), (1, 2)]


def test_wrapped_layers_are_the_same_layers(model):
    before = find_moe_layers(model)
    get_peft_model(model, OrdMoEConfig())
    assert find_moe_layers(model) == before


def test_a_dense_model_has_none():
    with pytest.raises(OrdMoEModelError, match="no MoE layers"):
        find_moe_layers(models.qwen3_dense())
