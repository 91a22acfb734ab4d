"""The stand-in for TRL's fused head: its memory is that of a tile, whatever the vocabulary."""

import torch

from ordmoe_peft._compat import FakeTensorMode
from ordmoe_peft.tools.plan.lm_head import TILE_TOKENS, TILE_VOCABULARY, log_probs_as_on_cuda, tile_bytes
from ordmoe_peft.tools.plan.trace import MemoryTrace


def test_a_tile_has_few_tokens_and_part_of_the_vocabulary():
    assert tile_bytes(10, torch.bfloat16) == 10 * TILE_VOCABULARY * 2
    assert tile_bytes(10 * TILE_TOKENS, torch.float32) == TILE_TOKENS * TILE_VOCABULARY * 4


def test_what_is_held_forward_and_backward():
    """6 tokens of width 8 in fp32: the tile beside 7 statistics; then a statistic, the result and gradients stay."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    trace = MemoryTrace(fakes)
    with fakes, trace:
        hidden_NH = torch.empty(6, 8, requires_grad=True)
        weight_VH = torch.empty(2 * TILE_VOCABULARY, 8)
        before = trace.live
        log_probs_N = log_probs_as_on_cuda(hidden_NH, weight_VH)
        assert trace.peak == before + tile_bytes(6, torch.float32) + 7 * 6 * 4
        assert trace.live == before + 2 * 6 * 4
        log_probs_N.sum().backward()
        assert hidden_NH.grad.shape == hidden_NH.shape
