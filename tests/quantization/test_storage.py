import bitsandbytes.functional as bnb
import pytest
import torch

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization.storage import (
    UNPACKED_AT_A_TIME,
    dense_stack,
    expert_unpacker,
    is_packed,
    logical_shape,
    pack_experts,
)


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


@pytest.mark.parametrize("use_double_quant", [False, True])
@pytest.mark.parametrize("rows_of_a_piece", [0, 1, 3, 7, 12, 13])
def test_experts_unpack_by_pieces_into_one_matrix(rows_of_a_piece, use_double_quant):
    packed = pack_experts(torch.randn(3, 12, 128).bfloat16(), "stack", use_double_quant=use_double_quant)
    whole, by_pieces = expert_unpacker(packed), expert_unpacker(packed, piece_size=rows_of_a_piece * 128 + 5)
    addresses = set()
    for expert in (2, 0, 1):
        matrix = by_pieces(expert)
        assert torch.equal(matrix, whole(expert))
        addresses.add(matrix.data_ptr())
    assert len(addresses) == 1


def test_compute_dtype_is_that_of_the_unpacked_expert():
    packed = pack_experts(torch.randn(2, 16, 32), "experts.down_proj", compute_dtype=torch.bfloat16)
    assert expert_unpacker(packed)(1).dtype == torch.bfloat16


@pytest.mark.parametrize("use_double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_experts_that_are_not_whole_blocks_are_filled_up_and_cut_off_again(blocksize, use_double_quant):
    stack = torch.randn(3, 9, 7)
    packed = pack_experts(stack, "experts.down_proj", "nf4", use_double_quant, blocksize=blocksize)
    assert logical_shape(packed) == stack.shape
    assert packed.nbytes == 3 * blocksize / 2, "one block for each expert"
    unpack = expert_unpacker(packed)
    for expert in range(3):
        alone = pack_experts(stack[expert : expert + 1], "experts.down_proj", "nf4", blocksize=blocksize)
        got, wanted = unpack(expert), expert_unpacker(alone)(0)
        assert got.shape == (9, 7)
        if use_double_quant:
            torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.0)
        else:
            assert torch.equal(got, wanted)
        assert ((got - stack[expert]).abs().mean() / stack[expert].abs().mean()) < 0.2


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_bytes_can_be_presented_in_another_dtype(quant_storage):
    stack = torch.randn(3, 9, 7)
    packed = pack_experts(stack, "experts.down_proj", quant_storage=quant_storage)
    assert packed.dtype == quant_storage
    plain = pack_experts(stack, "experts.down_proj")
    assert torch.equal(packed.data.view(-1).view(torch.uint8), plain.data.view(-1))
    assert torch.equal(expert_unpacker(packed)(2), expert_unpacker(plain)(2))


def test_a_dtype_that_bitsandbytes_does_not_pack_is_refused_by_name():
    with pytest.raises(OrdMoEModelError, match=r"experts.down_proj is torch.float64.*llm_int8_skip_modules"):
        pack_experts(torch.randn(2, 8, 8, dtype=torch.float64), "experts.down_proj")


def test_a_dense_stack_is_not_packed():
    stack = torch.nn.Parameter(torch.randn(2, 9, 7))
    assert not is_packed(stack)
    assert logical_shape(stack) == (2, 9, 7)


@pytest.mark.parametrize("use_double_quant", [False, True])
def test_experts_in_one_matrix_are_packed_as_bitsandbytes_packs_it(use_double_quant):
    flat = torch.randn(24, 128)
    packed = pack_experts(flat, "experts.mlp.w1", use_double_quant=use_double_quant, compute_dtype=torch.float32)
    bytes_, state = bnb.quantize_4bit(flat, blocksize=64, compress_statistics=use_double_quant, quant_type="nf4")
    assert torch.equal(packed.data, bytes_)
    assert packed.quant_state == state
    whole = bnb.dequantize_4bit(bytes_, state)
    assert torch.equal(dense_stack(packed, torch.float32), whole)
    assert torch.equal(dense_stack(packed, torch.bfloat16, slice(5, 17)), whole[5:17].bfloat16())


@pytest.mark.parametrize("shape", [(5, 9, 7), (5, 4, 64)])
@pytest.mark.parametrize("numbers", [1, 3 * 256, UNPACKED_AT_A_TIME])
def test_stacks_are_unpacked_some_experts_at_a_time(monkeypatch, shape, numbers):
    monkeypatch.setattr("ordmoe_peft.quantization.storage.UNPACKED_AT_A_TIME", numbers)
    packed = pack_experts(torch.randn(shape), "stack", use_double_quant=True)
    unpack = expert_unpacker(packed)
    whole = torch.stack([unpack(expert) for expert in range(5)])
    for experts in (slice(None), slice(1, 4), slice(4, None)):
        dense = dense_stack(packed, torch.float32, experts)
        assert dense.is_contiguous()
        assert torch.equal(dense, whole[experts])
