"""The experts function against one token and one expert at a time: every layout, dense and in 4 bits, with LoRA."""

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from ordmoe_peft.layers.experts_forward import experts_forward
from ordmoe_peft.ops.frozen_experts import LowRank
from ordmoe_peft.quantization.storage import expert_unpacker, pack_experts
from tests import reference


NUM_EXPERTS, HIDDEN, WIDTH, R = 5, 16, 24, 3
LAYOUTS = {
    "gated": {},
    "transposed": {"is_transposed": True},
    "biased": {"has_bias": True},
    "transposed and biased": {"is_transposed": True, "has_bias": True},
    "not gated": {"has_gate": False},
}
ROUTINGS = {
    "mixed, one expert empty": [[2, 0], [0, 3], [2, 3], [1, 0]],
    "all tokens on one expert": [[3], [3], [3]],
    "one token": [[1, 4]],
}


class Config:
    _experts_implementation = "eager"


def build_experts(**flags) -> nn.Module:
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = NUM_EXPERTS, nn.SiLU()

    has_gate = flags.get("has_gate", True)
    module = use_experts_implementation(Experts, **flags)(Config())
    up_name, up_features = ("gate_up_proj", 2 * WIDTH) if has_gate else ("up_proj", WIDTH)
    for name, out_features, in_features in ((up_name, up_features, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
        shape = (in_features, out_features) if flags.get("is_transposed") else (out_features, in_features)
        setattr(module, name, nn.Parameter(torch.randn(NUM_EXPERTS, *shape) * 0.3, requires_grad=False))
        if flags.get("has_bias"):
            setattr(module, f"{name}_bias", nn.Parameter(torch.randn(NUM_EXPERTS, out_features), requires_grad=False))
    return module


def build_lora(module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's weights of both projections: A `(E·r, I)`, B `(O, r·E)`."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up_features = (2 if module.has_gate else 1) * WIDTH
    return {
        name: (
            torch.randn(NUM_EXPERTS * R, in_features, requires_grad=True),
            torch.randn(out_features, R * NUM_EXPERTS, requires_grad=True),
        )
        for name, out_features, in_features in ((up_name, up_features, HIDDEN), ("down_proj", HIDDEN, WIDTH))
    }


def factors(A, B, scaling=0.5) -> list[LowRank]:
    return [LowRank(A, B, NUM_EXPERTS, scaling)]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(flags, routing, packed):
    module = build_experts(**flags)
    lora = build_lora(module)
    index = torch.tensor(routing)
    x = torch.randn(len(index), HIDDEN, requires_grad=True)
    weights = torch.rand(index.shape, requires_grad=True)
    if packed:
        for name in lora:
            setattr(module, name, pack_experts(getattr(module, name).data, name))

    def with_delta(name, A, B):
        weight = getattr(module, name)
        dense = torch.stack([expert_unpacker(weight)(e) for e in range(NUM_EXPERTS)]) if packed else weight
        delta = reference.expert_deltas(A, B, NUM_EXPERTS, 0.5)
        return dense + (delta.transpose(1, 2) if module.is_transposed else delta)

    got = experts_forward(module, x, index, weights, expert_lora={name: factors(*ab) for name, ab in lora.items()})
    wanted = reference.experts(module, x, index, weights, {name: with_delta(name, *ab) for name, ab in lora.items()})
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    inputs = [x, weights, *(tensor for ab in lora.values() for tensor in ab)]
    direction = torch.randn_like(wanted)
    for mine, true in zip(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(wanted, inputs, direction), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


def test_two_adapters_add_up():
    module = build_experts()
    one, two = build_lora(module), build_lora(module)
    index, x, weights = torch.tensor([[0, 1]]), torch.randn(1, HIDDEN), torch.rand(1, 2)
    both = {name: factors(*one[name]) + factors(*two[name], scaling=2.0) for name in one}
    summed = {
        name: getattr(module, name)
        + reference.expert_deltas(*one[name], NUM_EXPERTS, 0.5)
        + reference.expert_deltas(*two[name], NUM_EXPERTS, 2.0)
        for name in one
    }
    got = experts_forward(module, x, index, weights, expert_lora=both)
    torch.testing.assert_close(got, reference.experts(module, x, index, weights, summed), rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_the_dtype_of_the_activations():
    module = build_experts().to(torch.bfloat16)
    x = torch.randn(4, HIDDEN, dtype=torch.bfloat16)
    index, weights = torch.tensor([[0, 1], [1, 2], [3, 4], [0, 4]]), torch.rand(4, 2, dtype=torch.bfloat16)
    lora = {name: factors(*ab) for name, ab in build_lora(module).items()}
    got = experts_forward(module, x, index, weights, expert_lora=lora)
    assert got.dtype == torch.bfloat16
    exact = experts_forward(module.float(), x.float(), index, weights.float(), expert_lora=lora)
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
