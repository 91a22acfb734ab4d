"""What is kept of LoRA's factors between forwards without gradients is never out of date."""

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


def logits_anew(model) -> torch.Tensor:
    """The same with nothing kept before."""
    for module in model.modules():
        module.__dict__.get("kept", {}).clear()
    return logits(model)


FACTORS = {
    "experts' A": "experts.base_layer.lora_A.default.weight",
    "experts' B": "experts.base_layer.lora_B.default.weight",
    "router": "gate.lora_A.default.weight",
    "base of the router": "gate.base_layer.weight",
}


def replace_data(B):
    B.data = B.data * 2


def write_through_data(B):
    B.data.mul_(2)


def write_in_place(B):
    with torch.no_grad():
        B.mul_(2)


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("change", [write_in_place, write_through_data, replace_data])
def test_a_changed_factor_counts_at_once(tuned, change, factor):
    before = logits(tuned)
    assert torch.equal(logits(tuned), before)
    change(tuned.get_parameter(f"base_model.model.model.layers.1.mlp.{factor}"))
    changed = logits(tuned)
    assert not torch.allclose(changed, before)
    assert torch.equal(logits_anew(tuned), changed)


def test_nothing_is_kept_in_training(tuned):
    mlp = tuned.base_model.model.model.layers[1].mlp
    logits(tuned)
    assert mlp.experts.base_layer.kept and mlp.gate.kept
    tuned(**models.text_batch())
    assert not mlp.experts.base_layer.kept and not mlp.gate.kept


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


def test_a_changed_scale_counts_at_once_and_piles_nothing_up(tuned):
    router = tuned.base_model.model.model.layers[1].mlp.gate
    before = logits(tuned)
    for scale in (20.0, 30.0):
        router.scaling["default"] = scale
        assert not torch.equal(logits(tuned), before)
        assert len(router.kept) == 1
    changed = logits(tuned)
    assert torch.equal(logits_anew(tuned), changed)


def test_scales_of_experts_pile_nothing_up(tuned):
    down = tuned.base_model.model.model.layers[1].mlp.experts
    before = logits(tuned)
    for scale in (20.0, 30.0):
        down.scaling["default"] = scale
        assert not torch.equal(logits(tuned), before)
        assert len(down.kept) == 1
    changed = logits(tuned)
    assert torch.equal(logits_anew(tuned), changed)
