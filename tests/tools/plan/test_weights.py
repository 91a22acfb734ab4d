"""A model without weights is counted as the loaded one."""

import pytest
import torch
from transformers import AutoConfig

from ordmoe_peft import MoeBitsAndBytesConfig, quantization_census
from ordmoe_peft.cli.arguments import ModelArguments
from ordmoe_peft.cli.plan import PlanArguments, plan_settings
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization.memory_by_role import QuantizationCensus
from ordmoe_peft.quantization.storage import is_packed
from ordmoe_peft.tools.plan.known_models import load_config
from ordmoe_peft.tools.plan.weights import build_meta_model
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject


FORMS = {
    "bf16": None,
    "nf4": {},
    "nf4-double": {"bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-128-double": {"bnb_4bit_blocksize": 128, "bnb_4bit_use_double_quant": True},
    "nf4-bf16-storage": {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_compute_dtype": torch.bfloat16},
}
FAMILIES = ("qwen3_moe", "qwen3_vl_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3", "qwen2_moe", "nemotron_h")


def quantization(form) -> MoeBitsAndBytesConfig | None:
    return None if FORMS[form] is None else MoeBitsAndBytesConfig(**FORMS[form])


def planned(folder, config) -> QuantizationCensus:
    return quantization_census(build_meta_model(AutoConfig.from_pretrained(folder), torch.bfloat16, config))


def loaded(model, folder, config):
    model.to(torch.bfloat16).save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_census_of_the_loaded_model(family, tmp_path):
    """Roles, dtypes, counts and bytes, for every way to store them."""
    for form in FORMS:
        model = loaded(getattr(models, family)(), tmp_path, quantization(form))
        assert planned(tmp_path, quantization(form)) == quantization_census(model), form


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("use_double_quant", [False, True])
def test_experts_of_odd_sizes_are_filled_up_to_blocks(blocksize, use_double_quant, tmp_path):
    """24 x 52 and 52 x 12 are no whole blocks of 64, and rows of 52 are none either."""
    model = models.qwen3_moe(hidden_size=52, moe_intermediate_size=12, num_attention_heads=2, num_key_value_heads=1)
    config = MoeBitsAndBytesConfig(bnb_4bit_blocksize=blocksize, bnb_4bit_use_double_quant=use_double_quant)
    model = loaded(model, tmp_path, config)
    census = planned(tmp_path, config)
    assert census == quantization_census(model)
    (experts,) = [row for row in census.rows if row.role == "experts"]
    assert experts.weights == 3 * 8 * 3 * 12 * 52
    assert experts.bytes > experts.weights / 2 + experts.weights / blocksize


def test_each_linear_layer_has_the_block_size_that_the_loader_gives_it(tmp_path):
    config = MoeBitsAndBytesConfig(bnb_4bit_blocksize=128)
    loaded_model = loaded(models.qwen3_moe(head_dim=32), tmp_path, config)
    built = build_meta_model(AutoConfig.from_pretrained(tmp_path), torch.bfloat16, config)

    def block_sizes(model):
        return {name: weight.quant_state.blocksize for name, weight in model.named_parameters() if is_packed(weight)}

    assert block_sizes(built) == block_sizes(loaded_model)
    assert set(block_sizes(built).values()) == {64, 128}


def test_a_checkpoint_in_4_bits_is_what_it_was_made_of(tmp_path):
    config = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["model.layers.1.mlp.experts"])
    loaded(models.qwen3_moe(), tmp_path / "dense", config).save_pretrained(tmp_path / "packed")
    model = type(models.qwen3_moe()).from_pretrained(tmp_path / "packed")
    stored = load_config(str(tmp_path / "packed"))
    settings = plan_settings(stored, ModelArguments(str(tmp_path / "packed")), PlanArguments())
    census = quantization_census(build_meta_model(stored, settings.dtype, settings.quantization))
    assert census == quantization_census(model)
    assert set(census.of("experts")) == {"bfloat16", "nf4"}


def test_a_tied_head_counts_once(tmp_path):
    models.qwen3_moe(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path)
    assert "head" not in {row.role for row in planned(tmp_path, None).rows}


def test_loading_a_model_after_a_plan_still_quantises(tmp_path):
    """bitsandbytes keeps its first code table, which must not be one without numbers."""
    models.qwen3_moe().save_pretrained(tmp_path)
    config = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True)
    planned(tmp_path, config)
    loaded = type(models.qwen3_moe()).from_pretrained(tmp_path, quantization_config=config)
    with torch.no_grad():
        assert loaded(**models.text_batch()).logits.isfinite().all()


def test_a_model_without_experts_is_refused():
    with pytest.raises(OrdMoEModelError, match="no MoE layers"):
        build_meta_model(models.qwen3_dense().config, torch.bfloat16)


def test_packed_stacks_that_are_dense_while_they_run_are_refused_by_name():
    """Inkling's shared experts; its routed ones are of the interface."""
    subject = Subject(next(row for row in installed_rows() if row.name == "InklingForCausalLM"))
    config = subject.model.config
    config.architectures = ["InklingForCausalLM"]
    assert build_meta_model(config, torch.bfloat16) is not None
    with pytest.raises(OrdMoEModelError, match=r"shared_experts \(InklingSharedExperts\) takes in 4 bits is not known"):
        build_meta_model(config, torch.bfloat16, MoeBitsAndBytesConfig())
