"""What is said of a model from its configuration alone is what loading it would show."""

import re

import pytest
import torch
import transformers
from transformers import Qwen3MoeConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

from ordmoe_peft.errors import OrdMoEError, OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tools.families import build_model, describe_family
from tests.families import tiny
from tests.families.rows import ROWS, Row, installed_rows


def on_meta(row: Row):
    with torch.device("meta"):
        return row.model_class(tiny.tiny_config(row.config_class, row.changes))


def described(name: str, variant: str = ""):
    return describe_family(on_meta(next(row for row in ROWS if (row.name, row.variant) == (name, variant))))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in installed_rows()])
def test_verdicts_are_those_of_models_with_weights(row):
    """`tests/families` holds the same messages against `tier_routing`, `get_peft_model` and `quantize_experts_`."""
    try:
        refused = dict(describe_family(on_meta(row)).refused)
    except OrdMoEError as error:
        refused = dict.fromkeys(["tiers", "lora", "4 bits"], str(error))
    expected = {what: message for what, message in row.refused.items() if what != "merging"}
    assert refused.keys() - {"attention"} == expected.keys()
    for what, message in expected.items():
        assert re.search(message, refused[what])


def test_layers_that_are_alike_are_one_group():
    report = described("Qwen3MoeForCausalLM", "renormalised, dense first")
    (group,) = report.layers
    assert (group.decoder_layers, report.num_decoder_layers) == ([1, 2], 3)
    assert (group.block, group.router, group.experts) == (
        "model.layers.*.mlp",
        "Qwen3MoeTopKRouter",
        "Qwen3MoeExperts",
    )
    assert (group.num_experts, group.top_k, group.tiers, group.refused) == (8, 2, "up to 4", None)
    assert group.layout == "fused"
    assert ("experts", "model.layers.*.mlp.experts.down_proj", 2) in report.targets
    assert ("router", "model.layers.*.mlp.gate.weight", 2) in report.targets
    assert ("attention", "model.layers.*.self_attn.q_proj", 3) in report.targets
    assert report.refused == {}


def test_a_layer_can_be_in_several_groups():
    report = described("Ernie4_5_VLMoeForConditionalGeneration")
    assert [group.block.rpartition(".")[2] for group in report.layers] == ["text_moe", "vision_moe"]
    assert [group.decoder_layers for group in report.layers] == [[1, 2], [1, 2]]
    columns = report.tables()[0].texts().columns.tolist()
    assert columns == ["", "layers 1-2", "layers 1-2"]


def test_the_layout_of_experts():
    assert described("GptOssForCausalLM").layers[0].layout == "fused, transposed, biased"


def test_layers_without_ranks_route_as_usual():
    report = described("DeepseekV4ForCausalLM")
    assert [(group.decoder_layers, group.tiers) for group in report.layers] == [([0], "as usual"), ([1, 2], "up to 4")]
    assert "as usual: experts are chosen without ranks" in report.tables()[0].note


def test_what_takes_no_text_is_left_alone():
    report = described("Dots3NoteForConditionalGeneration")
    assert report.left_alone == {"model.vision_tower": 1}
    assert all(group.block.startswith("model.language_model.") for group in report.layers)
    assert described("Qwen3MoeForCausalLM").left_alone == {}


def test_experts_that_lora_cannot_tell_apart():
    report = described("DbrxForCausalLM")
    assert (report.layers[0].layout, report.layers[0].tiers) == ("flat", "up to 4")
    assert "LoRA would be one for all experts" in report.refused["experts"]
    assert {role for role, _, _ in report.targets} == {"router", "attention"}


def test_a_block_that_chooses_is_run_without_the_products_of_its_experts(monkeypatch):
    """They take minutes where experts are as large as DBRX's."""
    monkeypatch.setattr(DbrxExpertGLU, "forward", lambda *args: pytest.fail("an expert ran"))
    assert described("DbrxForCausalLM").layers[0].tiers == "up to 4"


def test_experts_outside_transformers_interface_are_built_from_a_configuration():
    row = next(row for row in ROWS if row.name == "DbrxForCausalLM")
    config = tiny.tiny_config(row.config_class, row.changes)
    config.architectures = [row.name]
    assert describe_family(build_model(config)).layers[0].layout == "flat"


def test_layers_apart_are_named_apart():
    report = described("NemotronHForCausalLM")
    assert report.tables()[0].texts().columns.tolist() == ["", "layers 1, 3"]


def test_a_large_model_takes_no_memory():
    """DeepSeek-V3 in its own sizes; one router has numbers."""
    model = build_model(transformers.DeepseekV3Config())
    report = describe_family(model)
    assert (report.layers[0].decoder_layers, report.layers[0].tiers) == (list(range(3, 61)), "up to 32")
    held = sum(
        {
            weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
            for weight in model.state_dict().values()
        }.values()
    )
    assert held < 2 * MoEModel.of(model).layers[0].router.weight.nbytes


def test_a_router_that_cannot_choose_is_refused():
    config = Qwen3MoeConfig(num_experts=8, num_experts_per_tok=9, num_hidden_layers=1, hidden_size=64)
    report = describe_family(build_model(config))
    assert "selected index k out of range" in report.refused["tiers"]
    assert report.layers[0].tiers == "refused"


def test_a_checkpoint_that_something_else_has_quantised():
    config = Qwen3MoeConfig(num_hidden_layers=1, quantization_config={"quant_method": "fp8"})
    report = describe_family(build_model(config), "a/checkpoint")
    assert report.refused["4 bits"].startswith("a/checkpoint is quantised by fp8")
    assert report.refused["4 bits"].endswith("is said of the dense model.")
    assert report.refused.keys() == {"4 bits"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "nothing"}, "KeyError: 'nothing'"),
        ({"hidden_size": -4}, "RuntimeError: .* negative dimension"),
        ({"num_experts": 0}, "has no MoE layers"),
    ],
)
def test_what_no_model_can_be_built_of_is_refused(changes, message):
    with pytest.raises(OrdMoEModelError, match=message):
        describe_family(build_model(Qwen3MoeConfig(**changes)))
