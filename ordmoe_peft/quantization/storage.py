"""A fused expert stack packed in 4 bits by bitsandbytes: one `Params4bit` for all experts of a projection.

bitsandbytes packs a tensor in blocks of 64 weights or more, in memory order. When an expert's matrix is a whole number
of blocks, no block straddles two experts, and one expert can be unpacked without touching the others.
"""

from collections.abc import Callable

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Params4bit

from ..errors import OrdMoEModelError


BLOCK_SIZE = 64


def is_packed(weight: torch.Tensor) -> bool:
    """Whether `weight` holds 4-bit blocks rather than numbers."""
    return isinstance(weight, Params4bit) and weight.quant_state is not None


def logical_shape(weight: torch.Tensor) -> torch.Size:
    """The shape of the numbers that `weight` stands for, packed or not."""
    return weight.quant_state.shape if is_packed(weight) else weight.shape


def check_whole_blocks(name: str, shape: torch.Size) -> None:
    """Raise [`OrdMoEModelError`] unless each expert of the stack `name` is a whole number of blocks."""
    weights = shape[1:].numel()
    if weights % BLOCK_SIZE:
        raise OrdMoEModelError(
            f"{name}: an expert has {shape[1]} x {shape[2]} = {weights} weights, which is not a multiple of the 4-bit "
            f"block size {BLOCK_SIZE}, so its blocks would straddle experts. Add {name.rpartition('.')[0]!r} to "
            "`llm_int8_skip_modules` to leave these experts unquantised."
        )


def pack_experts(
    weight_EOI: torch.Tensor,
    name: str,
    quant_type: str = "nf4",
    use_double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> Params4bit:
    """Pack a fused stack.

    Args:
        weight_EOI (`torch.Tensor` of shape `(E, O, I)`): the stack in any floating dtype, in its own layout.
        name (`str`): the parameter's name, for the error.
        quant_type (`str`, defaults to `"nf4"`): `"nf4"` or `"fp4"`.
        use_double_quant (`bool`, defaults to `False`): also store the blocks' scales in 8 bits.
        compute_dtype (`torch.dtype`, *optional*): dtype that experts are unpacked to; the stack's own by default.
        quant_storage (`torch.dtype`, defaults to `torch.uint8`): dtype in which the bytes are presented.

    Raises:
        [`OrdMoEModelError`]: an expert's matrix is not a whole number of blocks.
    """
    check_whole_blocks(name, weight_EOI.shape)
    packed = Params4bit(
        weight_EOI,
        requires_grad=False,
        blocksize=BLOCK_SIZE,
        compress_statistics=use_double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
    ).to(weight_EOI.device)
    if compute_dtype is not None:
        packed.quant_state.dtype = compute_dtype
    return packed


def expert_unpacker(packed: Params4bit) -> Callable[[int], torch.Tensor]:
    """A function from an expert's index to its dense matrix (`torch.Tensor` of shape `(O, I)`, in `compute_dtype`).

    The scales of all experts are unpacked here, once (a 32nd of the dense stack); the weights one expert a call.
    """
    state = packed.quant_state
    num_experts, matrix_shape = state.shape[0], torch.Size(state.shape[1:])
    bytes_E = packed.data.reshape(-1).view(torch.uint8).view(num_experts, -1, 1)
    absmax = state.absmax
    if state.nested:
        absmax = bnb_functional.dequantize_blockwise(absmax, state.state2) + state.offset
    absmax_E = absmax.float().view(num_experts, -1)
    # By rows, which bitsandbytes' CPU kernel shares out among threads; flat where rows are not whole blocks, whose
    # scales it mixes up (0.50.2).
    rows_shape = matrix_shape if matrix_shape[-1] % state.blocksize == 0 else torch.Size([matrix_shape.numel()])

    def unpack(expert: int) -> torch.Tensor:
        expert_state = bnb_functional.QuantState(
            absmax=absmax_E[expert],
            shape=rows_shape,
            dtype=state.dtype,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
        )
        return bnb_functional.dequantize_4bit(bytes_E[expert], expert_state).view(matrix_shape)

    return unpack
