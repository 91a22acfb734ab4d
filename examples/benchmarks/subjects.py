"""The models that the benchmarks compare: one frozen Qwen3-MoE with random weights, with and without adapters.

All variants of a base share its weights in memory, so that they can be timed by turns in one process.
"""

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.storage import pack_experts


R, VOCAB_SIZE, HEAD_DIM, SEQUENCE = 16, 1024, 64, 256
# What an adapter is compared with, and what it may be: implementation of the experts, and who adapts them.
VARIANTS = {
    "floor": ("grouped_mm", None),
    "ours": ("ordmoe", "ordmoe"),
    "PEFT, grouped_mm": ("grouped_mm", "peft"),
    "PEFT, eager": ("eager", "peft"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch.

    Args:
        experts (`int`), top_k (`int`), hidden (`int`), width (`int`), layers (`int`): E, K, H, F and MoE layers.
        tokens (`int`): T, in rows of [`SEQUENCE`].
        used (`int`, *optional*): all tokens go to the first so many experts.
    """

    experts: int
    top_k: int
    hidden: int
    width: int
    layers: int
    tokens: int
    used: int | None = None


SHAPES = {
    "tiny": Shape(8, 2, 64, 64, 2, 64),
    "small": Shape(64, 8, 512, 192, 4, 1024),
    "wide": Shape(128, 8, 1024, 384, 4, 512),
    "mixtral": Shape(8, 2, 1024, 2048, 2, 512),
    "skewed": Shape(128, 8, 1024, 384, 4, 512, used=4),
    "30b_2k": Shape(128, 8, 2048, 768, 4, 2048),
    "30b_8k": Shape(128, 8, 2048, 768, 4, 8192),
}


def build_base(shape: Shape, dtype: torch.dtype, nf4: bool, device: str) -> Qwen3MoeForCausalLM:
    """A frozen model whose router spreads tokens evenly, or over `shape.used` experts."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // HEAD_DIM,
        num_key_value_heads=max(1, shape.hidden // HEAD_DIM // 4),
        head_dim=HEAD_DIM,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.width,
        norm_topk_prob=True,
        dtype=dtype,
    )
    model = random_model(config, dtype, device)
    for layer in MoEModel.of(model).layers:
        if nf4:
            for name in layer.projections:
                setattr(layer.experts, name, pack_experts(getattr(layer.experts, name).data, name))
        if shape.used is not None:
            layer.router.register_forward_hook(lambda _, __, out: (*out[:2], out[2] % shape.used))
    model.enable_input_require_grads()
    return model.train()


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A frozen model with random weights, always the same, made on `device`."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rotary = type(model.model.rotary_emb)(config).to(device)
    model = model.to_empty(device=device).requires_grad_(False)
    model.model.rotary_emb = rotary
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:  # one random matrix for all experts: time does not depend on the numbers
            parameter.copy_(torch.randn(parameter.shape[1:], dtype=dtype, device=device) * 0.02)
        elif parameter.dim() == 2:
            parameter.normal_(std=0.3 if "gate.weight" in name else 0.02)
        else:
            parameter.fill_(1.0)
    return model


def variant(base: Qwen3MoeForCausalLM, name: str, checkpointing: bool = False) -> nn.Module:
    """`base` as one of [`VARIANTS`], its weights shared, with LoRA on routers and experts that does something."""
    implementation, method = VARIANTS[name]
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, memo=shared)
    model.set_experts_implementation(implementation)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if method is None:
        return model
    targets = [name for name, parameter in model.named_parameters() if ".mlp." in name]
    config = (
        OrdMoEConfig(r=R, lora_alpha=2 * R, num_tiers=1)
        if method == "ordmoe"
        else LoraConfig(r=R, lora_alpha=2 * R, target_modules=[], target_parameters=targets)
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model.train()


def batch(shape: Shape, device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, and as labels."""
    generator = torch.Generator().manual_seed(seed)
    length = min(SEQUENCE, shape.tokens)
    ids = torch.randint(VOCAB_SIZE, (shape.tokens // length, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Forward, loss and backward: what a training step does before its optimizer."""
    model.zero_grad(set_to_none=True)
    model(**inputs, use_cache=False).loss.backward()
