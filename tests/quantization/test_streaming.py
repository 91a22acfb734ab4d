import copy

import pytest
import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

from ordmoe_peft.quantization.storage import expert_unpacker, pack_experts
from ordmoe_peft.quantization.streaming import PackWhileMerging, packs_by_expert


NAME = "mlp.experts.gate_up_proj"
PATTERNS = {"source_patterns": ["experts.*.gate", "experts.*.up"], "target_patterns": [NAME]}


def on_disk() -> dict[str, list[torch.Tensor]]:
    """Gate and up of 5 experts, 12 x 32 each."""
    generator = torch.Generator().manual_seed(0)
    return {name: [torch.randn(12, 32, generator=generator) for _ in range(5)] for name in PATTERNS["source_patterns"]}


def merged() -> torch.Tensor:
    return torch.stack([torch.cat(pair) for pair in zip(*on_disk().values(), strict=True)])


def operation(pack, is_stack=lambda name: True) -> PackWhileMerging:
    return PackWhileMerging([MergeModulelist(0), Concatenate(1)], pack, is_stack)


def test_a_stack_is_packed_to_the_bytes_of_packing_it_whole():
    (packed,) = operation(pack_experts).convert(on_disk(), full_layer_name=NAME, **PATTERNS).values()
    whole = pack_experts(merged(), NAME)
    assert packed.quant_state.shape == (5, 24, 32)
    assert torch.equal(packed.data, whole.data)
    assert torch.equal(expert_unpacker(packed)(3), expert_unpacker(whole)(3))


def test_experts_are_merged_when_their_turn_comes_and_let_go_after_it():
    tensors, left = on_disk(), []

    def pack(matrices, name):
        for matrix in matrices:
            assert matrix.shape == (24, 32)
            left.append([len(per_expert) for per_expert in tensors.values()])
        return "packed"

    result = operation(pack).convert(tensors, full_layer_name=NAME, **PATTERNS)
    assert result == {NAME: "packed"}
    assert left == [[4, 4], [3, 3], [2, 2], [1, 1], [0, 0]]


def test_a_stack_that_is_not_to_be_packed_is_merged_as_transformers_does():
    plain = operation(pack_experts, is_stack=lambda name: False)
    (stack,) = plain.convert(on_disk(), full_layer_name=NAME, **PATTERNS).values()
    assert torch.equal(stack, merged())


def test_copies_made_for_each_tensor_on_disk_are_one_and_the_same():
    one = operation(pack_experts)
    assert copy.deepcopy(one) is one


@pytest.mark.parametrize(
    ("operations", "wanted"),
    [
        ([MergeModulelist(0)], True),
        ([MergeModulelist(0), Concatenate(1)], True),
        ([MergeModulelist(0), Concatenate(0)], False),
        ([MergeModulelist(1)], False),
        ([MergeModulelist(0), Transpose(1, 2, check_dims=True)], False),
        ([Concatenate(1)], False),
    ],
)
def test_only_merges_that_treat_experts_by_themselves_are_done_one_at_a_time(operations, wanted):
    assert packs_by_expert(operations) == wanted
