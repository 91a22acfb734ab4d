import copy
import gc
import pickle
import weakref

import pytest
from peft import get_peft_model
from torch import nn

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from tests import models


def test_layers_are_found_with_their_sizes(model):
    layers = MoEModel.of(model).layers
    assert [(layer.index, layer.decoder_layer) for layer in layers] == [(i, i) for i in range(models.NUM_LAYERS)]
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(models.NUM_EXPERTS, models.TOP_K)}
    assert {layer.projections for layer in layers} == {("gate_up_proj", "down_proj")}
    assert MoEModel.of(model).text_models == {model.get_decoder(): layers}


def test_dense_layers_between_are_passed_over():
    model = models.qwen3_moe(mlp_only_layers=[1], intermediate_size=40)
    assert [(layer.index, layer.decoder_layer) for layer in MoEModel.of(model).layers] == [(0, 0), (1, 2)]


def test_wrapped_layers_are_the_same_layers(model):
    before = MoEModel.of(model).layers
    get_peft_model(model, OrdMoEConfig())
    assert MoEModel.of(model).layers == before


def test_a_dense_model_has_none():
    with pytest.raises(OrdMoEModelError, match="no MoE layers"):
        MoEModel.of(models.qwen3_dense())


def test_weights_that_zero3_shares_out_are_refused(model):
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape
    with pytest.raises(OrdMoEModelError, match=f"{type(model).__name__} were shared out by DeepSpeed ZeRO-3"):
        MoEModel.of(model)


def test_the_view_is_built_once_and_follows_the_model(model):
    view = MoEModel.of(model)
    assert MoEModel.of(model) is view
    tuned = get_peft_model(model, OrdMoEConfig())
    assert MoEModel.of(model) is not view, "wrapped modules have come"
    assert MoEModel.of(model).layers == view.layers
    assert [layer.router for layer in MoEModel.of(tuned).layers] == [layer.router for layer in view.layers]

    view, removed = MoEModel.of(model), MoEModel.of(model).layers[1]
    block = model.get_submodule(removed.block_name)
    model.get_submodule(removed.decoder_layers_name)[removed.decoder_layer].mlp = nn.Identity()
    assert [layer.experts for layer in MoEModel.of(model).layers] == [
        layer.experts for layer in view.layers if layer is not removed
    ]
    model.get_submodule(removed.decoder_layers_name)[removed.decoder_layer].mlp = block
    assert MoEModel.of(model).layers == view.layers


def test_a_copy_has_a_view_of_its_own(model):
    view = MoEModel.of(model)
    copied = MoEModel.of(copy.deepcopy(model))
    assert [layer.block_name for layer in copied.layers] == [layer.block_name for layer in view.layers]
    assert not {id(layer.router) for layer in copied.layers} & {id(layer.router) for layer in view.layers}


def test_top_k_is_the_routers_own_of_now(model):
    layer = MoEModel.of(model).layers[0]
    layer.router.top_k = 1
    assert MoEModel.of(model).layers[0].top_k == 1


def test_a_view_is_no_part_of_its_model(model):
    tuned = get_peft_model(model, OrdMoEConfig(r=4))
    assert MoEModel.of(tuned).text_models
    assert b"ordmoe_peft" not in pickle.dumps(tuned.unload())


def test_a_view_does_not_keep_its_model_alive():
    gc.disable()
    try:
        model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
        text_model = model.get_base_model().model
        for part in (model, text_model):
            view = MoEModel.of(part)
            assert view.text_models
            assert view.decoder_layers
        weight = weakref.ref(next(model.parameters()))
        del model, text_model, part, view
        assert weight() is None
    finally:
        gc.enable()
