"""`quantize_experts_`: what it packs, what it says it did, and what it refuses without touching the model."""

import copy
import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.quantization import quantizer
from ordmoe_peft.quantization.storage import is_packed
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject


def packed_parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if is_packed(parameter)}


def test_packs_the_experts_as_loading_does_and_nothing_else(model, batch, tmp_path):
    config = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True)
    model.save_pretrained(tmp_path)
    loaded = packed_parameters(type(model).from_pretrained(tmp_path, quantization_config=config))
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert quantize_experts_(model, config) is model
    packed = packed_parameters(model)
    assert set(packed) == {name for name in loaded if "experts" in name}
    for name, parameter in model.named_parameters():
        if name in packed:
            assert torch.equal(parameter, loaded[name]), name
            assert parameter.quant_state == loaded[name].quant_state
        else:
            assert torch.equal(parameter, dense[name]), name
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert model(**batch).logits.isfinite().all()


def test_the_model_is_like_a_loaded_one_to_others():
    model = quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4"))
    assert model.is_quantized
    assert model.is_loaded_in_4bit
    assert model.hf_quantizer.is_trainable
    said = model.config.to_dict()["quantization_config"]
    assert said["quant_method"] == model.quantization_method == "ordmoe_peft"
    assert said["bnb_4bit_quant_type"] == "fp4"
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()


def test_dense_stacks_are_freed_one_by_one(monkeypatch):
    model = models.qwen3_moe()
    dense = {name: weakref.ref(model.get_parameter(name)) for name, p in model.named_parameters() if p.dim() == 3}
    alive = []
    pack = quantizer.pack_experts

    def counting(*args, **kwargs):
        gc.collect()
        alive.append(sum(reference() is not None for reference in dense.values()))
        return pack(*args, **kwargs)

    monkeypatch.setattr(quantizer, "pack_experts", counting)
    quantize_experts_(model)
    assert alive == list(range(len(dense), 0, -1))


def test_the_callers_config_is_left_as_it_was():
    config = MoeBitsAndBytesConfig(llm_int8_skip_modules=["model.layers.1.mlp.experts"])
    before = config.to_dict()
    model = quantize_experts_(models.qwen3_moe(), config)
    assert config.to_dict() == before
    assert not is_packed(model.model.layers[1].mlp.experts.down_proj)
    assert is_packed(model.model.layers[0].mlp.experts.down_proj)


def test_a_name_to_skip_that_skips_nothing_is_mentioned(caplog):
    config = MoeBitsAndBytesConfig(llm_int8_skip_modules=["model.layer.1", r"model\.layers\.(0|2)\.mlp", "down_proj"])
    with caplog.at_level(logging.WARNING, logger="ordmoe_peft"):
        model = quantize_experts_(models.qwen3_moe(), config)
    (message,) = [record.message for record in caplog.records if "llm_int8_skip_modules" in record.message]
    assert "names ['model.layer.1'], of which Qwen3MoeForCausalLM has nothing" in message
    assert set(packed_parameters(model)) == {"model.layers.1.mlp.experts.gate_up_proj"}


def test_experts_that_are_modules_of_linear_layers_are_packed_and_nothing_else(tmp_path):
    subject = Subject(next(row for row in installed_rows() if row.name.startswith("Switch")))
    dense = {name: type(module) for name, module in subject.model.named_modules()}
    model = quantize_experts_(subject.copy())
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert packed == {name for name, kind in dense.items() if kind is nn.Linear and ".experts." in name}
    # Its layers cast their input to the dtype of their weights.
    assert {model.get_parameter(f"{name}.weight").dtype for name in packed} == {torch.float32}
    wanted = subject.logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert {name for name, module in again.named_modules() if isinstance(module, Linear4bit)} == packed
    assert torch.equal(subject.logits(again), wanted)
    assert {name: type(module) for name, module in model.dequantize().named_modules()} == dense
    torch.testing.assert_close(subject.logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_linear_layers_that_experts_share_their_names_with_are_left_alone(tmp_path):
    subject = Subject(next(row for row in installed_rows() if row.name.startswith("Switch")))
    model = subject.copy()
    model.encoder.also = nn.ModuleDict({"expert_0": nn.ModuleDict({"wi": nn.Linear(64, 64)})})
    quantize_experts_(model, MoeBitsAndBytesConfig(llm_int8_skip_modules=["expert_3"]))
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    names = {name for name, module in subject.model.named_modules() if type(module) is nn.Linear}
    assert packed == {name for name in names if ".experts." in name and "expert_3" not in name}


def test_experts_that_transformers_keeps_in_float32_stay_dense(monkeypatch):
    subject = Subject(next(row for row in installed_rows() if row.name.startswith("Switch")))
    model = subject.copy()
    monkeypatch.setattr(model, "_keep_in_fp32_modules", ["wo"])
    quantize_experts_(model)
    experts = {name: type(module) for name, module in model.named_modules() if ".experts." in name}
    assert {kind for name, kind in experts.items() if name.endswith(".wo")} == {nn.Linear}
    assert {kind for name, kind in experts.items() if name.endswith(".wi")} == {Linear4bit}


def test_weights_that_experts_share_are_packed_once():
    subject = Subject(next(row for row in installed_rows() if row.name.startswith("Switch")))
    model = subject.copy()
    experts = model.encoder.block[1].layer[1].mlp.experts
    experts["expert_2"].wi.weight = experts["expert_5"].wi.weight
    quantize_experts_(model)
    assert experts["expert_2"].wi.weight is experts["expert_5"].wi.weight
    assert is_packed(experts["expert_2"].wi.weight)
    model.dequantize()
    assert experts["expert_2"].wi.weight is experts["expert_5"].wi.weight


def test_rows_of_one_matrix_that_are_no_whole_blocks_cannot_be_packed():
    row = next(row for row in installed_rows() if row.name.startswith("Dbrx"))
    changes = copy.deepcopy(row.changes) | {"d_model": 48}
    changes["ffn_config"]["hidden_size"] = 48
    model = Subject(dataclasses.replace(row, changes=changes)).model
    with pytest.raises(OrdMoEModelError, match="rows of their matrices are not whole blocks of 64"):
        quantize_experts_(model)
    assert not packed_parameters(model)


def test_an_adapter_goes_on_top(model, batch):
    tuned = get_peft_model(quantize_experts_(model), OrdMoEConfig(r=4))
    tuned(**batch).logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tuned.parameters() if parameter.requires_grad)


def adapted(model) -> PeftModel:
    return get_peft_model(model, OrdMoEConfig(r=4))


def with_wrapped_attention(model):
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(
    ("prepare", "config", "error"),
    [
        (quantize_experts_, None, r"quantised already, by 'ordmoe_peft'.*dequantize\(\)"),
        (adapted, None, "PeftModel.*Quantise the base first"),
        (with_wrapped_attention, None, r"has an adapter, on model\.layers\.0\.self_attn\.q_proj.*unload\(\)"),
        (lambda model: model.to("meta"), None, r"gate_up_proj is not in memory"),
        (lambda model: model.double(), None, r"down_proj is torch\.float64"),
        (lambda model: model, {"llm_int8_skip_modules": ["experts"]}, "names all experts of the model, or the rows"),
    ],
    ids=["quantised", "PeftModel", "adapter", "meta", "float64", "all skipped"],
)
def test_refuses(prepare, config, error):
    model = prepare(models.qwen3_moe())
    before = dict(model.named_parameters(remove_duplicate=False))
    implementation = model.get_experts_implementation()
    with pytest.raises(OrdMoEModelError, match=error):
        quantize_experts_(model, MoeBitsAndBytesConfig(**(config or {})))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert model.get_experts_implementation() == implementation


def test_refuses_a_model_without_experts_and_the_stock_config():
    with pytest.raises(OrdMoEModelError, match="no MoE layers"):
        quantize_experts_(models.qwen3_dense())
    with pytest.raises(OrdMoEConfigError, match="takes a MoeBitsAndBytesConfig, got BitsAndBytesConfig"):
        quantize_experts_(models.qwen3_moe(), BitsAndBytesConfig(load_in_4bit=True))
