import bitsandbytes.functional as bnb
import pytest
import torch

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization.storage import expert_unpacker, is_packed, logical_shape, pack_experts


@pytest.mark.parametrize("use_double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_experts_unpack_one_at_a_time_to_what_bitsandbytes_gives_for_the_stack(quant_type, use_double_quant):
    stack = torch.randn(5, 48, 32)
    packed = pack_experts(stack, "experts.gate_up_proj", quant_type, use_double_quant)
    assert is_packed(packed)
    assert logical_shape(packed) == stack.shape
    assert packed.numel() * packed.element_size() * 2 == stack.numel()
    packed.quant_state.shape = torch.Size([stack.numel()])
    whole = bnb.dequantize_4bit(packed.data, packed.quant_state).view(stack.shape)
    packed.quant_state.shape = stack.shape
    unpack = expert_unpacker(packed)
    assert torch.equal(torch.stack([unpack(expert) for expert in range(5)]), whole)
    assert ((whole - stack).abs().mean() / stack.abs().mean()) < 0.15


def test_compute_dtype_is_that_of_the_unpacked_expert():
    packed = pack_experts(torch.randn(2, 16, 32), "experts.down_proj", compute_dtype=torch.bfloat16)
    assert expert_unpacker(packed)(1).dtype == torch.bfloat16


def test_blocks_that_would_straddle_experts_are_refused_by_name():
    with pytest.raises(OrdMoEModelError, match=r"experts.down_proj.*9 x 7 = 63 weights.*llm_int8_skip_modules"):
        pack_experts(torch.randn(2, 9, 7), "experts.down_proj")


def test_a_dense_stack_is_not_packed():
    stack = torch.nn.Parameter(torch.randn(2, 9, 7))
    assert not is_packed(stack)
    assert logical_shape(stack) == (2, 9, 7)
