"""What TRL's fused LM head allocates on a CUDA device.

There its Triton kernels fold each tile of logits in place; without them, as on CPU, the same arithmetic makes several
fp32 copies of a tile, so that a trace on CPU would say too much. Source: `trl/kernels/chunked_logprob.py` (trl 1.16).
"""

import torch


# Tokens and vocabulary entries in a tile of logits.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
# fp32 numbers per token that the forward folds tiles into.
STATISTICS = 7


def tile_bytes(tokens: int, dtype: torch.dtype) -> int:
    """What a tile of logits takes, in bytes: all that exists of them at a time."""
    return min(tokens, TILE_TOKENS) * TILE_VOCABULARY * dtype.itemsize


def log_probs_as_on_cuda(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """A stand-in for log-probabilities (`torch.Tensor` of shape `(N,)`) with the memory of the real ones."""
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    return _TiledHead.apply(hidden_NH, weight_VH, dtype)


def _tile(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What is held while a tile is worked on: itself, and its inputs in the dtype of the product."""
    tokens = min(len(hidden_NH), TILE_TOKENS)
    tile = hidden_NH.new_empty(tokens, TILE_VOCABULARY, dtype=dtype)
    return tile, hidden_NH[:tokens].to(dtype), weight_VH[:TILE_VOCABULARY].to(dtype)


class _TiledHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, dtype):
        statistics_N = [hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32) for _ in range(STATISTICS)]
        _tile(hidden_NH, weight_VH, dtype)
        ctx.save_for_backward(hidden_NH, weight_VH, statistics_N[0])
        ctx.dtype = dtype
        return statistics_N[1]

    @staticmethod
    def backward(ctx, grad_N):
        hidden_NH, weight_VH, _ = ctx.saved_tensors
        grad_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        tile = _tile(hidden_NH, weight_VH, ctx.dtype)
        del tile
        return grad_NH.to(hidden_NH.dtype), None, None
