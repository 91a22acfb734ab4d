"""An expert stack packed in 4 bits by bitsandbytes: one `Params4bit` for all experts of a projection.

bitsandbytes packs numbers in blocks of 64 or more, in memory order. Each expert's matrix is packed by itself, filled up
with zeros to whole blocks, so no block straddles two experts and one expert can be unpacked without the others. The
`quant_state` keeps the logical shape: `(E, O, I)`, or `(E · F, H)` of a matrix of all experts, which is packed whole.
Stacks are read through [`stack_unpacker`] alone: bitsandbytes' own `dequantize_4bit` knows nothing of the filling, and
on CPU it mixes the scales of rows shorter than a block up (0.50.2).
"""

from collections.abc import Callable, Iterable, Sized
from typing import Protocol, TypeAlias

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Params4bit
from torch.nn import functional as F

from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..experts.layout import Experts


# The smallest block, and bitsandbytes' default.
BLOCK_SIZE = 64
# Scales that share a scale of their own under double quantisation (`quantize_4bit` in `bitsandbytes/functional.py`).
NESTED_BLOCK_SIZE = 256
# Numbers that are unpacked, and then cast, at a time.
UNPACKED_AT_A_TIME = 2**24
Unpacker: TypeAlias = Callable[[Experts], torch.Tensor]
# What bitsandbytes packs and unpacks to (`bitsandbytes/functional.py`).
PACKABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Matrices(Sized, Iterable[torch.Tensor], Protocol):
    """The matrices of all experts, one after the other: a tensor of shape `(E, O, I)`, or something that reads them."""


def is_packed(weight: torch.Tensor) -> bool:
    """Whether `weight` holds 4-bit blocks rather than numbers."""
    return getattr(weight, "quant_state", None) is not None


def logical_shape(weight: torch.Tensor) -> torch.Size:
    """The shape of the numbers that `weight` stands for, packed or not."""
    return weight.quant_state.shape if is_packed(weight) else weight.shape


def stored_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold `weight`: itself, and the scales and code tables of a packed one."""
    if not is_packed(weight):
        return [weight]
    state = weight.quant_state
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [weight, state.absmax, state.code, *nested]


def check_packable(name: str, dtype: torch.dtype) -> None:
    """Raise [`OrdMoEModelError`] where bitsandbytes does not pack the stack `name`, which is in `dtype`."""
    if dtype not in PACKABLE_DTYPES:
        raise OrdMoEModelError(
            f"{name} is {dtype}, which bitsandbytes does not pack in 4 bits: load the model in bfloat16, float16 or "
            "float32 (`dtype`), or add the stack to `llm_int8_skip_modules`."
        )


def pack_experts(
    matrices: Matrices,
    name: str,
    quant_type: str = "nf4",
    use_double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    blocksize: int = BLOCK_SIZE,
) -> Params4bit:
    """Pack a fused stack, one expert at a time.

    Args:
        matrices (`torch.Tensor` of shape `(E, O, I)`, or a sized iterable of E of shape `(O, I)`): the stack in its own
            layout. An iterable that reads its matrices when asked keeps memory at one of them. A tensor of shape
            `(E · F, H)`, all experts in one matrix, is packed as such; its rows must be whole blocks.
        name (`str`): the parameter's name, for the error.
        quant_type (`str`, defaults to `"nf4"`): `"nf4"` or `"fp4"`.
        use_double_quant (`bool`, defaults to `False`): also store the blocks' scales in 8 bits.
        compute_dtype (`torch.dtype`, *optional*): dtype that experts are unpacked to; the stack's own by default.
        quant_storage (`torch.dtype`, defaults to `torch.uint8`): dtype in which the bytes are presented.
        blocksize (`int`, defaults to 64): weights that share a scale. An expert that is not a multiple of it is filled
            up with zeros.

    Raises:
        [`OrdMoEModelError`]: the stack is in a dtype that bitsandbytes does not pack.
    """
    parts: Matrices = (matrices,) if isinstance(matrices, torch.Tensor) and matrices.dim() == 2 else matrices
    stored: list[torch.Tensor] = []  # bytes and scales of all experts
    for expert, matrix_OI in enumerate(parts):
        check_packable(name, matrix_OI.dtype)
        weights = F.pad(matrix_OI.reshape(-1), (0, -matrix_OI.numel() % blocksize))
        packed, state = bnb_functional.quantize_4bit(weights, blocksize=blocksize, quant_type=quant_type)
        stored = stored or [part.new_empty(len(parts), part.numel()) for part in (packed, state.absmax)]
        for rows_E, part in zip(stored, (packed, state.absmax), strict=True):
            rows_E[expert] = part.view(-1)
    bytes_EP, absmax_EN = stored
    state.shape = torch.Size([len(parts), *matrix_OI.shape]) if parts is matrices else matrix_OI.shape
    state.dtype = compute_dtype or state.dtype
    state.absmax, state.nested = absmax_EN.view(-1), use_double_quant
    if use_double_quant:  # the scales in 8 bits, as bitsandbytes' `quantize_4bit` has them
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = bnb_functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=NESTED_BLOCK_SIZE
        )
    return Params4bit(
        bytes_EP.view(-1).view(quant_storage).view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=blocksize,
        compress_statistics=use_double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
        bnb_quantized=True,
    )


def stack_unpacker(packed: Params4bit, piece_size: int | None = None, all_scales: bool = True) -> Unpacker:
    """A function from experts to their dense matrices (`torch.Tensor` of shape `(C, O, I)`, in `compute_dtype`).

    Where all experts are in one matrix, each of its rows counts as an expert, with a matrix of shape `(1, I)`.

    It takes a `slice`, whose bytes are read where they are, or a `torch.Tensor` of shape `(C,)` on the stack's device,
    whose bytes are gathered; they are unpacked in one call.

    Args:
        packed (`Params4bit`): the stack.
        piece_size (`int`, *optional*): unpack about so many weights at a time, into one matrix that each call
            overwrites; experts are then asked for one by one. Where rows are not whole blocks, they are unpacked whole.
        all_scales (`bool`, defaults to `True`): unpack the scales of all experts here, once (a 32nd of the dense
            stack), rather than those of the experts asked for in each call. Where experts do not begin with a block of
            scales, all are unpacked all the same.

    Raises:
        [`OrdMoERuntimeError`]: the bytes were cast as if they were numbers.
    """
    if packed.dtype != packed.quant_storage:
        raise OrdMoERuntimeError(
            f"Packed experts were cast from {packed.quant_storage} to {packed.dtype}, which destroys them, as "
            "`model.to(dtype)` does where `bnb_4bit_quant_storage` is a floating dtype. Load the model anew, with the "
            "dtype of everything else as `dtype` of `from_pretrained`."
        )
    state = packed.quant_state
    num_experts, *rows, in_features = state.shape
    (out_features,) = rows or [1]
    bytes_EP = packed.data.reshape(-1).view(torch.uint8).view(num_experts, -1)
    scales_of = _scales(state, all_scales)
    # bitsandbytes' CPU kernel shares rows out among threads, but mixes up the scales of rows that are not whole blocks
    # (0.50.2). Such an expert is unpacked as one row, and what filled its last block up is cut off.
    has_whole_rows = in_features % state.blocksize == 0
    width = in_features if has_whole_rows else 2 * bytes_EP.shape[1]

    def dense(bytes_CP: torch.Tensor, absmax_CN: torch.Tensor) -> torch.Tensor:
        of_rows = bnb_functional.QuantState(
            absmax=absmax_CN.reshape(-1),
            shape=torch.Size([2 * bytes_CP.numel() // width, width]),
            dtype=state.dtype,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
        )
        return bnb_functional.dequantize_4bit(bytes_CP.reshape(-1, 1), of_rows)

    def unpack(experts: Experts) -> torch.Tensor:
        bytes_CP = bytes_EP[experts]
        weights_CX = dense(bytes_CP, scales_of(experts)).view(len(bytes_CP), -1)
        return weights_CX[:, : out_features * in_features].view(-1, out_features, in_features)

    if piece_size is None or not has_whole_rows:
        return unpack
    step = max(1, piece_size // in_features)
    matrix_1OI = torch.empty(1, out_features, in_features, dtype=state.dtype, device=packed.device)

    def unpack_by_pieces(expert: Experts) -> torch.Tensor:
        bytes_OP, absmax_ON = (part.view(out_features, -1) for part in (bytes_EP[expert], scales_of(expert)))
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            matrix_1OI[0, rows] = dense(bytes_OP[rows], absmax_ON[rows])
        return matrix_1OI

    return unpack_by_pieces


def _scales(state: bnb_functional.QuantState, all_scales: bool) -> Unpacker:
    """A function from experts to the scales of their blocks (`torch.Tensor` of shape `(C, N)`, float32)."""
    stored_EN = state.absmax.view(state.shape[0], -1)
    if not state.nested:
        return stored_EN.float().__getitem__
    if all_scales or stored_EN.shape[1] % NESTED_BLOCK_SIZE:
        absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return absmax.float().view(stored_EN.shape).__getitem__
    of_scales_EN = state.state2.absmax.view(state.shape[0], -1)

    def unpack(experts: Experts) -> torch.Tensor:
        stored_CN = stored_EN[experts]
        absmax = bnb_functional.dequantize_blockwise(
            stored_CN.reshape(-1),
            absmax=of_scales_EN[experts].reshape(-1),
            code=state.state2.code,
            blocksize=NESTED_BLOCK_SIZE,
        )
        return (absmax + state.offset).float().view(stored_CN.shape)

    return unpack


def expert_unpacker(packed: Params4bit, piece_size: int | None = None) -> Callable[[int], torch.Tensor]:
    """[`stack_unpacker`] for one expert at a time: its index → its dense matrix (`torch.Tensor` of shape `(O, I)`)."""
    unpack = stack_unpacker(packed, piece_size)
    return lambda expert: unpack(slice(expert, expert + 1))[0]


def dense_stack(packed: Params4bit, dtype: torch.dtype, experts: slice = slice(None)) -> torch.Tensor:
    """The numbers that the packed stack stands for, in its own shape: `(E, O, I)` or, in one matrix, `(E · F, H)`.

    Args:
        packed (`Params4bit`): the stack.
        dtype (`torch.dtype`): of the result. About `UNPACKED_AT_A_TIME` numbers are unpacked at a time and cast.
        experts (`slice`): which of the first dimension, all by default.
    """
    unpack, shape = stack_unpacker(packed, all_scales=experts == slice(None)), logical_shape(packed)
    first, last, _ = experts.indices(shape[0])
    dense = torch.empty(last - first, *shape[1:], dtype=dtype, device=packed.device)
    step = max(1, UNPACKED_AT_A_TIME // shape[1:].numel())
    for start in range(first, last, step):
        part = dense[start - first : start - first + step]
        part.copy_(unpack(slice(start, start + len(part))).view_as(part))
    return dense
