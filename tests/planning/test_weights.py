"""The plan's bytes are those of the loaded model."""

import pytest
import torch
from transformers import AutoConfig

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.planning.weights import build_meta_model, weight_shares
from ordmoe_peft.quantization.storage import is_packed
from tests import models


FORMS = {
    "bf16": None,
    "nf4": {},
    "nf4-double": {"bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}
FAMILIES = ("qwen3_moe", "qwen3_vl_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3", "qwen2_moe")


def loaded_bytes(model) -> int:
    """Every byte that the parameters and buffers of a model in memory hold, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for packed in [tensor for tensor in tensors if is_packed(tensor)]:
        state = packed.quant_state
        tensors += [state.absmax, state.code]
        tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def planned(folder, form):
    return weight_shares(build_meta_model(AutoConfig.from_pretrained(folder), torch.bfloat16, quantization(form)))


def quantization(form) -> MoeBitsAndBytesConfig | None:
    return None if FORMS[form] is None else MoeBitsAndBytesConfig(**FORMS[form])


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_loaded_model(family, tmp_path):
    model = getattr(models, family)().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for form in FORMS:
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=quantization(form))
        assert sum(share.size for share in planned(tmp_path, form)) == loaded_bytes(loaded), form


def test_skipped_modules_are_planned_unquantised(tmp_path):
    model = models.qwen3_moe().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = MoeBitsAndBytesConfig(llm_int8_skip_modules=["model.layers.1.mlp.experts"])
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    shares = weight_shares(build_meta_model(AutoConfig.from_pretrained(tmp_path), torch.bfloat16, config))
    assert {share.form for share in shares if share.role == "experts"} == {"nf4", "bfloat16"}
    assert sum(share.size for share in shares) == loaded_bytes(loaded)


def test_roles(tmp_path):
    """By hand, for three layers of E 8 experts of 3 x 24 x 64 weights, H 64, V 96, and a head of its own."""
    models.qwen3_moe().to(torch.bfloat16).save_pretrained(tmp_path)
    weights = {share.role: share.weights for share in planned(tmp_path, "nf4")}
    assert weights["experts"] == 3 * 8 * 3 * 24 * 64
    assert weights["router"] == 3 * 8 * 64
    assert weights["attention"] == 3 * (2 * 64 * 64 + 2 * 64 * 32)
    assert weights["embeddings"] == weights["head"] == 96 * 64
    assert weights["norms"] == 3 * (2 * 64 + 2 * 16) + 64
    forms = {share.role: share.form for share in planned(tmp_path, "nf4")}
    assert {role for role, form in forms.items() if form == "nf4"} == {"experts", "attention"}


def test_roles_of_vision_and_shared_experts(tmp_path):
    models.qwen3_vl_moe().save_pretrained(tmp_path / "vision")
    vision = [share for share in planned(tmp_path / "vision", "nf4") if share.role == "vision"]
    tower = models.qwen3_vl_moe().model.visual
    assert {share.form for share in vision} == {"bfloat16", "float32"}, "weights, and a buffer of frequencies"
    assert vision[0].weights == sum(parameter.numel() for parameter in tower.parameters())
    models.qwen2_moe().save_pretrained(tmp_path / "shared")
    roles = {(share.role, share.form) for share in planned(tmp_path / "shared", "nf4")}
    assert ("shared_experts", "nf4") in roles
    assert ("shared_experts", "bfloat16") in roles, "rows of 40 are no whole blocks; gates have one output"


def test_a_tied_head_counts_once(tmp_path):
    models.qwen3_moe(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path)
    assert "head" not in {share.role for share in planned(tmp_path, "bf16")}


def test_loading_a_model_after_a_plan_still_quantises(tmp_path):
    """bitsandbytes keeps its first code table, which must not be one without numbers."""
    models.qwen3_moe().save_pretrained(tmp_path)
    planned(tmp_path, "nf4-double")
    config = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True)
    loaded = type(models.qwen3_moe()).from_pretrained(tmp_path, quantization_config=config)
    with torch.no_grad():
        assert loaded(**models.text_batch()).logits.isfinite().all()


def test_a_model_without_experts_is_refused():
    with pytest.raises(OrdMoEModelError, match="no MoE layers"):
        build_meta_model(models.qwen3_dense().config, torch.bfloat16)
