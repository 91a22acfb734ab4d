"""The models of sections d to g: random weights of Qwen3-MoE, packed on the device stack by stack, with an adapter."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import Qwen3MoeConfig

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_

from ..subjects import random_model
from .rows import Size


R = 16
# So that the plan counts what is run: `quantize_experts_` leaves linear layers as they are.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def config_of(size: Size, **changes: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**size.model | {"architectures": ["Qwen3MoeForCausalLM"], "pad_token_id": 0} | changes)


def quantization(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> MoeBitsAndBytesConfig:
    return MoeBitsAndBytesConfig(
        bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=LINEARS, **settings
    )


def packed_model(
    size: Size, device: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None, **settings: Any
) -> PeftModel:
    """A model in NF4 with double quantisation, and an adapter for three tiers that does something.

    Args:
        layers (`int`, *optional*): decoder layers; as many as `size` says by default.
        settings: of [`MoeBitsAndBytesConfig`].
    """
    changes = {} if layers is None else {"num_hidden_layers": layers}
    base = random_model(config_of(size, dtype=dtype, **changes), dtype, device)
    base = quantize_experts_(base, quantization(dtype, **settings))
    model = get_peft_model(base, OrdMoEConfig(r=R, lora_alpha=2 * R, num_tiers=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)  # as TRL does on quantised bases
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def random_batch(size: Size, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tokens, all of them answers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, size.model["vocab_size"], size.batch, generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
