"""Experts and routers compute with the factors that they have at that moment, in training and in decoding."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig
from tests import models


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def tuned(request):
    model = get_peft_model(models.qwen3_moe().to(request.param), OrdMoEConfig(r=4)).eval()
    models.randomize_adapter(model)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.text_batch()).logits


FACTORS = {
    "experts' A": "experts.base_layer.lora_A.default.weight",
    "experts' B": "experts.base_layer.lora_B.default.weight",
    "router": "gate.lora_A.default.weight",
    "base of the router": "gate.base_layer.weight",
}


def write_all_but_one_column(B):
    B.data[:, 1:] *= 2


def replace_data(B):
    B.data = B.data * 2


def write_through_data(B):
    B.data.mul_(2)


def write_in_place(B):
    with torch.no_grad():
        B.mul_(2)


CHANGES = [write_in_place, write_through_data, write_all_but_one_column, replace_data]


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("change", [write_in_place, write_through_data, write_all_but_one_column, replace_data])
def test_a_changed_factor_counts_at_once(tuned, change, factor):
    before = logits(tuned)
    change(tuned.get_parameter(f"base_model.model.model.layers.1.mlp.{factor}"))
    changed = logits(tuned)
    assert not torch.allclose(changed, before)
    assert torch.equal(logits(tuned), changed)


def test_an_adapter_of_the_same_name_begins_anew(tuned):
    tuned.add_adapter("second", OrdMoEConfig(r=4))
    tuned.set_adapter("second")
    fresh = logits(tuned)
    write_in_place(tuned.get_parameter(f"base_model.model.model.layers.1.mlp.{FACTORS['router']}"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.1)
    assert not torch.allclose(logits(tuned), fresh)
    tuned.delete_adapter("second")
    tuned.add_adapter("second", OrdMoEConfig(r=4))
    tuned.set_adapter("second")
    assert torch.equal(logits(tuned), fresh)


def test_switching_adapters_keeps_each_ones_own(tuned):
    first = logits(tuned)
    tuned.add_adapter("second", OrdMoEConfig(r=4))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.1)
    tuned.set_adapter("second")
    second = logits(tuned)
    assert not torch.allclose(first, second)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
