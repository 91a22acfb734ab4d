"""Models that something else has quantised: what works, what is refused by name, what is warned of."""

import json
import logging

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.utils.quantization_config import GPTQConfig

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig
from ordmoe_peft.cli.arguments import ModelArguments
from ordmoe_peft.cli.loading import load_base
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models


@pytest.fixture
def mxfp4(tmp_path):
    """A gpt-oss checkpoint with its experts in MXFP4, as it is on the hub: 32 numbers share a scale."""
    model = models.gpt_oss(hidden_size=64, intermediate_size=32).bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (num_experts, outer, inner // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((num_experts, outer, inner // 32), 124, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def state(model) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def assert_refused_untouched(model, match: str) -> None:
    before, kinds = state(model), [type(module) for module in model.modules()]
    with pytest.raises(OrdMoEModelError, match=match):
        get_peft_model(model, OrdMoEConfig(r=2))
    assert state(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_mxfp4_that_transformers_dequantises_is_adapted(mxfp4):
    model = GptOssForCausalLM.from_pretrained(mxfp4, quantization_config=Mxfp4Config(dequantize=True))
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    tuned = get_peft_model(model, OrdMoEConfig(r=2))
    tuned(**models.text_batch()).logits.square().mean().backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_B" in n and "experts" in n)


def test_mxfp4_experts_are_refused_by_name():
    model = models.gpt_oss()
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    model.config.quantization_config = Mxfp4Config()
    assert_refused_untouched(
        model, r"layers\.0\.mlp\.experts is a Mxfp4GptOssExperts.*quantised by mxfp4.*dequantize=True"
    )


def test_experts_in_8_bit_floats_are_refused_by_name():
    model = models.qwen3_moe()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    model.config.quantization_config = {"quant_method": "fp8"}
    assert_refused_untouched(model, r"layers\.1\.mlp\.experts.*down_proj is float8_e4m3fn.*quantised by fp8")


class Int4Tensor(torch.Tensor):
    """Stands for torchao's tensor subclasses: packed inside, bf16 to whom asks."""


def test_experts_in_a_tensor_subclass_are_refused_by_name():
    model = models.qwen3_moe()
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.data.as_subclass(Int4Tensor), requires_grad=False)
    model.config.quantization_config = {"quant_method": "torchao"}
    assert_refused_untouched(model, r"gate_up_proj is a Int4Tensor.*quantised by torchao.*MoeBitsAndBytesConfig")


def test_a_quantiser_that_leaves_no_experts_is_named():
    model = models.qwen3_dense()
    model.config.quantization_config = GPTQConfig(bits=4)
    assert_refused_untouched(model, r"quantised by gptq and has no experts")


@pytest.mark.parametrize("arguments", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_stock_bitsandbytes_works_and_warns_that_experts_are_dense(tmp_path, caplog, arguments):
    model = models.qwen3_moe()
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**arguments)
    )
    with caplog.at_level(logging.WARNING, logger="ordmoe_peft"):
        tuned = get_peft_model(stock, OrdMoEConfig(r=2))
    (message,) = [record.message for record in caplog.records if "stacks of experts" in record.message]
    # 8 experts of 48 x 64 and 64 x 24 in 3 layers, 2 bytes each; then half a byte, and 4 for 64.
    assert "0.22 MB of its" in message
    assert "experts in bfloat16" in message
    assert "MoeBitsAndBytesConfig" in message
    assert "about 0.06 MB" in message
    assert tuned(**models.text_batch()).logits.isfinite().all()


@pytest.mark.parametrize("quantised", [False, True])
def test_our_own_4_bits_and_dense_models_warn_of_nothing(tmp_path, caplog, quantised):
    model = models.qwen3_moe()
    if quantised:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, quantization_config=MoeBitsAndBytesConfig())
    with caplog.at_level(logging.WARNING, logger="ordmoe_peft"):
        get_peft_model(model, OrdMoEConfig(r=2))
    assert not [record for record in caplog.records if record.name.startswith("ordmoe_peft")]


def test_a_command_says_that_a_quantised_checkpoint_cannot_be_loaded_in_4_bits(mxfp4):
    options = ModelArguments(str(mxfp4), load_in_4bit=True)
    with pytest.raises(OrdMoEConfigError, match=r"is quantised by mxfp4.*load_in_4bit.*Mxfp4Config\(dequantize=True\)"):
        load_base(options, trust_remote_code=False)
