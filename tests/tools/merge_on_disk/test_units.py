import pytest
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools.merge_on_disk.checkpoint import open_checkpoint
from ordmoe_peft.tools.merge_on_disk.parameter_sources import find_sources
from ordmoe_peft.tools.merge_on_disk.units import plan_units
from ordmoe_peft.tools.merge_on_disk.weightless_model import WeightlessModel, meta_model
from tests import models


@pytest.fixture
def planned(tmp_path):
    """A function from a model, roles and further parameters to (checkpoint, sources, units)."""

    def plan(model, targets, also_changed=(), without=()):
        model.save_pretrained(tmp_path / "base")
        get_peft_model(model, OrdMoEConfig(targets=targets)).save_pretrained(tmp_path / "adapter")
        checkpoint, skeleton = open_checkpoint(tmp_path / "base"), meta_model(tmp_path / "base", False)
        sources = find_sources(skeleton, checkpoint.tensors, quantizer=None)
        sources = {name: source for name, source in sources.items() if name not in without}
        adapted = WeightlessModel(meta_model(tmp_path / "base", False), tmp_path / "adapter")
        return checkpoint, sources, plan_units(checkpoint, adapted, sources, also_changed)

    return plan


def test_no_unit_has_more_than_one_stack_and_each_tensor_is_in_one(planned):
    checkpoint, _, units = planned(models.qwen3_moe(), ["router", "experts"])
    changed = [unit for unit in units if unit.sources]
    assert all(len(unit.sources) == 1 and len(unit.sources[0].parameters) == 1 for unit in changed)
    assert len(changed) == 3 * models.NUM_LAYERS
    assert sorted(name for unit in units for name in unit.names) == sorted(checkpoint.files)
    assert all(len(unit.names) == 1 for unit in units if not unit.sources)


def test_a_linear_layers_bias_goes_with_its_weight(planned):
    _, _, units = planned(models.gpt_oss(), ["attention"])
    changed = [sorted(unit.names) for unit in units if unit.sources]
    prefix = "model.layers.0.self_attn.q_proj"
    assert [f"{prefix}.bias", f"{prefix}.weight"] in changed
    assert len(changed) == 4 * models.NUM_LAYERS


def test_units_are_in_the_checkpoints_order(planned):
    _, sources, units = planned(models.qwen3_moe(num_hidden_layers=11), ["router"], also_changed=["lm_head.weight"])
    layers = [int(unit.names[0].split(".")[2]) for unit in units if ".layers." in unit.names[0]]
    assert layers == sorted(layers)
    assert [sources["lm_head.weight"]] in [unit.sources for unit in units]


def test_an_adapted_parameter_without_tensors_is_refused(planned):
    with pytest.raises(OrdMoEModelError, match=r"The adapter changes model\.layers\.1\.mlp\.gate\.weight, for which"):
        planned(models.qwen3_moe(), ["router"], without=["model.layers.1.mlp.gate.weight"])
