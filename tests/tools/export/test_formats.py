"""Factors under the names that servers read."""

import torch

from ordmoe_peft.tools.export.formats import fused_keys, keys, per_expert_keys
from ordmoe_peft.tools.lora_factors import Factors


E, R, H, F = 3, 2, 5, 4
UP, DOWN = (Factors(torch.randn(E, R, i), torch.randn(E, o, R)) for o, i in ((2 * F, H), (H, F)))


def test_stacks_are_read_back_as_vllm_reads_them():
    """By the reshapes of `_stack_moe_lora_weights`, vllm/lora/model_manager.py."""
    tensors = fused_keys("mlp.experts", UP, DOWN)
    for module, factors in (("mlp.experts.base_layer", UP), ("mlp.experts", DOWN)):
        A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        A_ERI = A.reshape(E, -1, A.shape[-1])
        B_EOR = B.reshape(B.shape[0], -1, E).permute(2, 0, 1)
        assert torch.equal(A_ERI, factors.A_ERI) and torch.equal(B_EOR, factors.B_EOR)


def test_keys_for_each_expert():
    for is_concatenated, rows in ((True, (slice(F), slice(F, None))), (False, (slice(0, None, 2), slice(1, None, 2)))):
        tensors = per_expert_keys("mlp.experts", UP, DOWN, is_concatenated)
        assert len(tensors) == E * 3 * 2
        for expert in range(E):
            prefix = f"base_model.model.mlp.experts.{expert}"
            for part, half in zip(("gate_proj", "up_proj"), rows, strict=True):
                assert torch.equal(tensors[f"{prefix}.{part}.lora_A.weight"], UP.A_ERI[expert])
                assert torch.equal(tensors[f"{prefix}.{part}.lora_B.weight"], UP.B_EOR[expert][half])
            assert torch.equal(tensors[f"{prefix}.down_proj.lora_B.weight"], DOWN.B_EOR[expert])
    assert list(keys("a.b", DOWN)) == ["base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight"]
