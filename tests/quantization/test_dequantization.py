"""`dequantize()`: the dense model with the numbers that the packed one computes with."""

import gc
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization import dequantization
from ordmoe_peft.quantization.storage import dense_stack, is_packed
from tests import models


def quantised(model, folder, **config):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=MoeBitsAndBytesConfig(**config))


@pytest.mark.parametrize("in_place", [False, True], ids=["loaded", "in place"])
def test_the_dense_model_runs_on_stock_experts_with_the_same_logits(model, batch, tmp_path, in_place):
    names = set(model.state_dict())
    implementation = model.get_experts_implementation()
    packed = quantize_experts_(model) if in_place else quantised(model, tmp_path)
    with torch.no_grad():
        wanted = packed(**batch).logits
    dense = packed.dequantize()
    assert dense is packed
    assert not any(is_packed(parameter) for parameter in dense.parameters())
    assert not any(isinstance(module, Linear4bit) for module in dense.modules())
    assert dense.get_experts_implementation() == implementation != "ordmoe"
    assert set(dense.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(dense(**batch).logits, wanted, rtol=1e-4, atol=1e-4)


def test_biases_have_the_dtype_of_their_weights_again(tmp_path):
    """bitsandbytes casts the bias of a layer that has run to the dtype that it computes in."""
    model = models.qwen2_moe().bfloat16()
    model.save_pretrained(tmp_path)
    packed = (
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=MoeBitsAndBytesConfig()).eval()
    )
    batch = models.text_batch()
    with torch.no_grad():
        packed(**batch)
        assert packed.model.layers[0].self_attn.q_proj.bias.dtype == torch.float32
        dense = packed.dequantize()
        assert dense(**batch).logits.isfinite().all()
    assert dense.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


def test_nothing_says_any_longer_that_it_is_quantised(tmp_path):
    dense = quantised(models.qwen3_moe(), tmp_path).dequantize()
    assert not dense.is_quantized
    assert not hasattr(dense, "hf_quantizer")
    assert not getattr(dense, "is_loaded_in_4bit", False)
    assert "quantization_config" not in dense.config.to_dict()
    dense.float()


def test_the_dense_model_is_saved_in_the_form_of_its_family(tmp_path):
    packed = quantised(models.qwen3_moe(), tmp_path / "dense")
    packed.save_pretrained(tmp_path / "packed")
    dense = type(packed).from_pretrained(tmp_path / "packed").dequantize()
    dense.save_pretrained(tmp_path / "again")
    again = type(packed).from_pretrained(tmp_path / "again")
    assert sorted((tmp_path / "again").glob("*.safetensors"))
    for name, parameter in dense.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("dense", "again")]
    assert sizes[0] == sizes[1], "the same tensors of the same shapes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_the_whole_model_is_in_the_dtype_asked_for(tmp_path, dtype):
    packed = quantised(models.qwen3_moe(), tmp_path, bnb_4bit_use_double_quant=True)
    stack = dense_stack(packed.model.layers[1].mlp.experts.down_proj, torch.float32)
    buffers = {name: buffer.dtype for name, buffer in packed.named_buffers()}
    dense = packed.dequantize(dtype)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    assert {name: buffer.dtype for name, buffer in dense.named_buffers()} == buffers
    assert dense.config.dtype == dtype
    assert torch.equal(dense.model.layers[1].mlp.experts.down_proj, stack.to(dtype))
    assert dense(**models.text_batch()).logits.dtype == dtype


def test_a_dtype_held_on_purpose_stays():
    model = models.qwen3_moe().to(torch.bfloat16)
    model.model.layers[0].mlp.gate.float()
    dense = quantize_experts_(model).dequantize(torch.float16)
    assert dense.model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert dense.lm_head.weight.dtype == torch.float16


def test_packed_stacks_are_freed_one_by_one(monkeypatch):
    model = quantize_experts_(models.qwen3_moe())
    packed = [weakref.ref(parameter) for parameter in model.parameters() if is_packed(parameter)]
    alive = []

    def counting(*args):
        gc.collect()
        alive.append(sum(reference() is not None for reference in packed))
        return dense_stack(*args)

    monkeypatch.setattr(dequantization, "dense_stack", counting)
    model.dequantize()
    assert alive == list(range(len(packed), 0, -1))


def test_an_adapter_is_taken_off_first(tmp_path):
    tuned = get_peft_model(quantised(models.qwen3_moe(), tmp_path), OrdMoEConfig(r=4))
    with pytest.raises(OrdMoEModelError, match=r"has an adapter.*unload\(\).*dequantise it"):
        tuned.base_model.model.dequantize()
    assert is_packed(tuned.base_model.model.model.layers[0].mlp.experts.get_base_layer().down_proj)
    unloaded = tuned.unload().dequantize()
    assert unloaded(**models.text_batch()).logits.isfinite().all()
