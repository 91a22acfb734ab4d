import pytest
import torch

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools.merge_on_disk.checkpoint import open_checkpoint
from ordmoe_peft.tools.merge_on_disk.parameter_sources import find_sources
from tests import models


FAMILIES = {**models.FAMILIES, "gpt_oss": models.gpt_oss, "nemotron_h": models.nemotron_h}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_make_the_models_parameters_and_come_back_to_the_bit(family, tmp_path):
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    checkpoint, state = open_checkpoint(tmp_path), model.state_dict()
    sources = find_sources(model, checkpoint.tensors, quantizer=None)
    assert sources.keys() == state.keys()
    for source in set(sources.values()):
        tensors = checkpoint.read(source.names)
        parameters = source.to_parameters(tensors)
        assert all(torch.equal(parameters[name], state[name]) for name in source.parameters)
        back = source.to_tensors(parameters)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in back)


def test_tensors_of_one_stack_are_one_source():
    model = models.qwen3_moe()
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up")]
    shape = (models.EXPERT_WIDTH, models.HIDDEN_SIZE)
    tensors = {name: torch.empty(shape, device="meta") for name in [*names, "mtp.of_nothing"]}
    sources = find_sources(model, tensors, quantizer=None)
    assert sources.keys() == {"model.layers.0.mlp.experts.gate_up_proj"}
    assert set(sources["model.layers.0.mlp.experts.gate_up_proj"].names) == set(names)


def test_tensors_of_another_shape_are_refused():
    tensors = {"lm_head.weight": torch.empty(5, models.HIDDEN_SIZE, device="meta")}
    with pytest.raises(OrdMoEModelError, match=r"lm_head\.weight of shape \[5, 64\], but Qwen3MoeForCausalLM has \[96"):
        find_sources(models.qwen3_moe(), tensors, quantizer=None)


def test_a_form_that_cannot_be_written_back_is_refused():
    tensors = {
        f"model.layers.0.mlp.experts.{expert}.down_proj.weight": torch.empty(64, 24, device="meta")
        for expert in range(8)
    }
    model = models.qwen3_moe()
    (source,) = set(find_sources(model, tensors, quantizer=None).values())
    source.names_by_inner.clear()
    with_other_names = {f"old.{name}": tensor for name, tensor in tensors.items()}
    source.patterns = {f"old.{name}": pattern for name, pattern in source.patterns.items()}
    with pytest.raises(OrdMoEModelError, match=r"\(and 7 more\), a form that transformers can read and not write"):
        source.check(with_other_names, model.state_dict())
