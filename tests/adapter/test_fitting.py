"""A configuration that does not fit the model is refused by name, before anything changes."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models
from tests.adapter.test_model import adapted, logits


def test_too_many_tiers(model):
    with pytest.raises(OrdMoEConfigError, match=r"num_tiers=5.*K=2.*E=8.*fits is 4"):
        get_peft_model(model, OrdMoEConfig(num_tiers=5))
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert not any(hasattr(module, "tier_hook_handles") for module in model.modules())


def test_a_refused_configuration_is_left_as_it_was():
    config = OrdMoEConfig(targets=["experts", "shared_experts"])
    with pytest.raises(OrdMoEModelError, match="nothing of that role"):
        get_peft_model(models.qwen3_moe(), config)
    assert (config.base_moe, config.target_modules, config.target_parameters) == (None, None, None)


def test_an_adapter_of_another_base(tmp_path):
    adapted(models.qwen3_moe()).save_pretrained(tmp_path)
    for change, message in (
        ({"hidden_size": 128}, r"hidden_size 64 \(this model: 128\)"),
        ({"moe_intermediate_size": 32}, r"expert_width 24 \(this model: 32\)"),
        ({"num_experts": 16}, r"num_experts 8 \(this model: 16\)"),
    ):
        other = models.qwen3_moe(**change)
        with pytest.raises(OrdMoEModelError, match=f"made for another base.*{message}"):
            PeftModel.from_pretrained(other, tmp_path)
        assert not any("lora_" in name for name, _ in other.named_parameters())


def test_a_second_adapter_with_other_expert_targets_leaves_the_first(model, batch):
    tuned = adapted(model)
    wanted = logits(tuned, batch)
    with pytest.raises(ValueError, match="same set of parameters"):
        tuned.add_adapter("second", OrdMoEConfig(r=4, targets=["experts"]))
    assert list(tuned.peft_config) == ["default"]
    assert torch.equal(logits(tuned, batch), wanted)


def test_names_that_contradict_the_roles(model):
    with pytest.raises(OrdMoEConfigError, match="Set `targets` alone"):
        get_peft_model(model, OrdMoEConfig(target_modules=["q_proj"]))


def test_a_target_whose_name_another_module_ends_with():
    model = models.qwen3_moe()
    other: torch.nn.Module = torch.nn.Linear(4, 4)
    for name in ("q_proj", "self_attn", "0", "layers", "model"):
        other = torch.nn.ModuleDict({name: other})
    model.add_module("other", other)
    with pytest.raises(
        OrdMoEModelError, match=r"LoRA on other\.model\.layers\.0\.self_attn\.q_proj too.*Leave 'attention' out"
    ):
        get_peft_model(model, OrdMoEConfig(targets=["attention"]))
