"""Packed stacks that stay in RAM."""

import torch
from torch import nn

from ordmoe_peft.quantization.offloaded import at_hand, is_in_ram, offload, opener
from ordmoe_peft.quantization.ring import Ring
from ordmoe_peft.quantization.storage import dense_stack, expert_unpacker, pack_experts


def test_a_stack_is_on_the_device_while_its_layer_is_opened():
    dense = torch.randn(4, 3, 64)
    stack = offload(pack_experts(dense, "stack", use_double_quant=True), Ring())
    wanted = dense_stack(stack, torch.float32)
    with opener([nn.Parameter(dense), stack], torch.device("cpu"))():
        assert at_hand(stack) is not stack
        assert torch.equal(torch.stack([*map(expert_unpacker(at_hand(stack)), range(4))]), wanted)
    assert at_hand(stack) is stack
    assert is_in_ram(stack)


def test_others_are_read_from_where_they_are():
    weight = nn.Parameter(torch.ones(2))
    with opener([weight], torch.device("cpu"))():
        assert at_hand(weight) is weight
    assert not is_in_ram(weight)
