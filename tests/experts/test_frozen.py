"""What the differentiable function keeps, computes and refuses."""

import gc

import pytest
import torch

from ordmoe_peft.quantization.storage import expert_unpacker, pack_experts
from tests.experts.test_forward import HIDDEN, build_experts, build_lora, experts_forward, factors


def test_unpacked_scales_are_not_kept_between_forward_and_backward():
    module = build_experts()
    lora = {name: factors(*ab) for name, ab in build_lora(module).items()}
    for name in lora:
        setattr(module, name, pack_experts(getattr(module, name).data, name, use_double_quant=True))
    num_scales = {getattr(module, name).quant_state.absmax.numel() for name in lora}

    def unpacked_scales() -> list[torch.Tensor]:
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return [tensor for tensor in tensors if tensor.dtype == torch.float32 and tensor.numel() in num_scales]

    before = len(unpacked_scales())
    unpack = expert_unpacker(module.down_proj)
    assert len(unpacked_scales()) > before, "this is how one sees them"
    del unpack
    x = torch.randn(3, HIDDEN, requires_grad=True)
    output = experts_forward(module, x, torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.rand(3, 2), expert_lora=lora)
    assert len(unpacked_scales()) == before
    output.sum().backward()
    assert x.grad.any()


def test_no_tokens_give_no_output_and_gradients_of_zero():
    module = build_experts()
    lora = build_lora(module)
    x, weights = torch.empty(0, HIDDEN, requires_grad=True), torch.empty(0, 2, requires_grad=True)
    index = torch.empty(0, 2, dtype=torch.long)
    output = experts_forward(module, x, index, weights, expert_lora={name: factors(*ab) for name, ab in lora.items()})
    assert output.shape == (0, HIDDEN)
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not tensor.grad.any() for ab in lora.values() for tensor in ab)


def test_only_gradients_that_are_asked_for_are_computed():
    module = build_experts()
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.rand(3, 2)
    x = torch.randn(3, HIDDEN)
    everything = dict(zip(("A", "B"), build_lora(module)["gate_up_proj"], strict=True))

    def gradients(asked: str) -> dict[str, torch.Tensor]:
        leaves = {name: value.detach().requires_grad_(name in asked) for name, value in (everything | {"x": x}).items()}
        lora = {"gate_up_proj": factors(leaves["A"], leaves["B"])}
        output = experts_forward(module, leaves["x"], index, weights, expert_lora=lora)
        output.pow(2).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    whole = gradients("ABx")
    for asked in ("A", "B", "x", "Ax"):
        for name, gradient in gradients(asked).items():
            if name in asked:
                torch.testing.assert_close(gradient, whole[name])
            else:
                assert gradient is None


def test_a_second_derivative_is_refused():
    module = build_experts()
    lora = {name: factors(*ab) for name, ab in build_lora(module).items()}
    x = torch.randn(1, HIDDEN, requires_grad=True)
    output = experts_forward(module, x, torch.tensor([[0, 1]]), torch.rand(1, 2), expert_lora=lora)
    (gradient,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
