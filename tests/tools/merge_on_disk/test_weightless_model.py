import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.tools.merge_on_disk.weightless_model import WeightlessModel, meta_model
from tests import models


@pytest.fixture
def saved(tmp_path):
    """A family whose routers have buffers, with an adapter."""
    base = models.deepseek_v3()
    base.config.architectures = ["DeepseekV3ForCausalLM"]
    base.config.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, OrdMoEConfig(targets=["router", "experts"]))
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_a_model_on_meta_is_of_the_class_that_its_checkpoint_names(saved):
    model = meta_model(saved / "base", trust_remote_code=False)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_weights_take_no_memory_but_the_adapter_has_its_own(saved):
    model = WeightlessModel(meta_model(saved / "base", trust_remote_code=False), saved / "adapter")
    assert all(
        weight.value.untyped_storage().nbytes() <= 8 for name, weight in model.weights.items() if "lora_" not in name
    )
    assert len(model.adapted) == 3 * models.NUM_LAYERS
    assert all(weight.adapters == ["default"] for weight in model.adapted)
    assert all(layer.lora_B["default"].weight.norm() > 0 for layer in (weight.layer for weight in model.adapted))


@pytest.mark.parametrize("name", ["experts.down_proj", "gate.weight", "gate.e_score_correction_bias"])
def test_what_was_put_is_taken_once(saved, name):
    model = WeightlessModel(meta_model(saved / "base", trust_remote_code=False), saved / "adapter")
    name = f"model.layers.1.mlp.{name}"
    weight = model.weights[name]
    value = torch.randn(weight.value.shape)
    model.put(name, value.clone())
    assert torch.equal(weight.value, value)
    assert not weight.value.requires_grad
    assert torch.equal(model.take(name), value)
    assert weight.value.untyped_storage().nbytes() <= 8
    assert weight.value.shape == value.shape
