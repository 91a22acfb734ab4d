"""The experts of one MoE layer, as the benchmarks run them by themselves: their sizes, weights, factors and routing."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from ordmoe_peft.experts.frozen import LowRank
from ordmoe_peft.quantization.storage import pack_experts


R = 16


@dataclass(frozen=True)
class Layer:
    """The experts of a layer, and how tokens are routed.

    Args:
        experts (`int`), top_k (`int`), hidden (`int`), width (`int`): E, K, H and F.
        tokens (`int`): T.
        skew (`float`, defaults to 0): Zipf exponent of the experts' popularity.
        has_bias (`bool`), is_transposed (`bool`), has_norm (`bool`): the layout, all `False` by default.
        has_gate (`bool`, defaults to `True`): whether there is a gate.
    """

    experts: int
    top_k: int
    hidden: int
    width: int
    tokens: int
    skew: float = 0.0
    has_bias: bool = False
    is_transposed: bool = False
    has_norm: bool = False
    has_gate: bool = True


QWEN3_30B = Layer(128, 8, 2048, 768, 2048)
GPT_OSS_20B = Layer(32, 4, 2880, 2880, 2048, has_bias=True, is_transposed=True)
LAYERS = {
    "Qwen3-30B-A3B, even": QWEN3_30B,
    "Qwen3-30B-A3B, Zipf 0.5": replace(QWEN3_30B, skew=0.5),
    "Qwen3-30B-A3B, Zipf 1": replace(QWEN3_30B, skew=1.0),
    "Qwen3-30B-A3B, 8,192 tokens": replace(QWEN3_30B, tokens=8192),
    "gpt-oss-20b, even": GPT_OSS_20B,
    "Mixtral-8x7B, even": Layer(8, 2, 4096, 14336, 2048),
}
DECODING = {
    "Qwen3-30B-A3B": replace(QWEN3_30B, tokens=1),
    "gpt-oss-20b": replace(GPT_OSS_20B, tokens=1),
    "Mixtral-8x7B": replace(LAYERS["Mixtral-8x7B, even"], tokens=1),
}


def projections(layer: Layer) -> list[tuple[str, int, int]]:
    """Name, outputs and inputs of each."""
    up = ("gate_up_proj", 2 * layer.width) if layer.has_gate else ("up_proj", layer.width)
    return [(*up, layer.hidden), ("down_proj", layer.hidden, layer.width)]


def stack_shape(layer: Layer, out_features: int, in_features: int) -> tuple[int, int, int]:
    """Of a projection of all experts, in the layer's own layout."""
    return (layer.experts, *((in_features, out_features) if layer.is_transposed else (out_features, in_features)))


def empty_experts(layer: Layer, dtype: torch.dtype) -> nn.Module:
    """A module of experts as transformers' are, without weights."""

    class Experts(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            # Without a gate one that is not 0 at 0: what stands in gaps of the layout must not count.
            activation = nn.SiLU() if layer.has_gate else nn.Sigmoid()
            self.num_experts, self.act_fn, self.config = layer.experts, activation, config
            if layer.has_norm:
                self.post_expert_norm = nn.RMSNorm(layer.hidden, dtype=dtype).requires_grad_(False)

    class Config:
        _experts_implementation = "ordmoe"

    flags = {"has_bias": layer.has_bias, "is_transposed": layer.is_transposed, "has_gate": layer.has_gate}
    return use_experts_implementation(Experts, has_post_expert_norm=layer.has_norm, **flags)(Config())


def random_experts(
    layer: Layer, dtype: torch.dtype, device: str, packing: dict[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """[`empty_experts`] with weights, dense or, with arguments of `pack_experts`, in 4 bits."""
    experts, generator = empty_experts(layer, dtype).to(device), torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    for name, out_features, in_features in projections(layer):
        weight = normal(*stack_shape(layer, out_features, in_features)).mul_(in_features**-0.5)
        stack = nn.Parameter(weight, requires_grad=False) if packing is None else pack_experts(weight, name, **packing)
        experts.register_parameter(name, stack)
        if layer.has_bias:
            bias = nn.Parameter(normal(layer.experts, out_features), requires_grad=False)
            experts.register_parameter(f"{name}_bias", bias)
    return experts


def random_lora(
    layer: Layer, dtype: torch.dtype, device: str, r: int = R, seed: int = 1
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors of both projections that do something: A `(E·R, I)`, B `(O, R·E)`, which want gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        return numbers.mul_(shape[1] ** -0.5).requires_grad_()

    return {
        name: (leaf(layer.experts * r, in_features), leaf(out_features, r * layer.experts))
        for name, out_features, in_features in projections(layer)
    }


def updates(layer: Layer, lora: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, list[LowRank]]:
    """Factors as the experts function takes them."""
    return {name: [LowRank(A, B, layer.experts, 2.0)] for name, (A, B) in lora.items()}


def routing(layer: Layer) -> torch.Tensor:
    """Each token's experts (`torch.Tensor` of shape `(T, K)`), drawn without replacement."""
    generator = torch.Generator().manual_seed(0)
    popularity_E = -layer.skew * torch.log(torch.arange(1, layer.experts + 1).float())
    popularity_E = popularity_E[torch.randperm(layer.experts, generator=generator)]
    noise_TE = torch.randn(layer.tokens, layer.experts, generator=generator)
    return (noise_TE + popularity_E).topk(layer.top_k).indices
