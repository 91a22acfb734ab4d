"""A fused expert stack packed in 4 bits by bitsandbytes: one `Params4bit` for all experts of a projection.

bitsandbytes packs numbers in blocks of 64 or more, in memory order. Each expert's matrix is packed by itself, filled up
with zeros to whole blocks, so no block straddles two experts and one expert can be unpacked without the others. The
`quant_state` keeps the logical shape `(E, O, I)`. Stacks are read through [`expert_unpacker`] alone: bitsandbytes' own
`dequantize_4bit` knows nothing of the filling, and on CPU it mixes the scales of rows shorter than a block up (0.50.2).
"""

import threading
from collections.abc import Callable, Iterable, Sized
from typing import Protocol

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Params4bit
from torch.nn import functional as F

from ..errors import OrdMoEModelError, OrdMoERuntimeError


# The smallest block, and bitsandbytes' default.
BLOCK_SIZE = 64
# Scales that share a scale of their own under double quantisation (`quantize_4bit` in `bitsandbytes/functional.py`).
NESTED_BLOCK_SIZE = 256
# Weights of an expert from which on it is unpacked by pieces to 16 bits where it may be overwritten, and those of a
# piece. A large tensor that is freed leaves a hole in malloc's memory. There a kernel of 0.65 MB settles that oneDNN
# compiles for another number of rows, and the next tensor does not fit: unpacked whole, experts of 8 MB made a process
# grow to four times what it needs. Kernels do not fit into the holes of pieces. These cost a copy, so smaller experts
# are not cut, nor are those in 32 bits, whose products are not compiled.
LARGE_EXPERT, PIECE = 1 << 20, 1 << 18
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
            layout. An iterable that reads its matrices when asked keeps memory at one of them.
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
    bytes_EP = absmax_EN = None
    for expert, matrix_OI in enumerate(matrices):
        check_packable(name, matrix_OI.dtype)
        weights = F.pad(matrix_OI.reshape(-1), (0, -matrix_OI.numel() % blocksize))
        packed, state = bnb_functional.quantize_4bit(weights, blocksize=blocksize, quant_type=quant_type)
        if expert == 0:
            bytes_EP = packed.new_empty(len(matrices), packed.numel())
            absmax_EN = state.absmax.new_empty(len(matrices), state.absmax.numel())
            shape = torch.Size([len(matrices), *matrix_OI.shape])
        bytes_EP[expert], absmax_EN[expert] = packed.view(-1), state.absmax
    return Params4bit(
        bytes_EP.view(-1).view(quant_storage).view(-1, 1),
        requires_grad=False,
        quant_state=_stack_state(state, absmax_EN.view(-1), shape, use_double_quant, compute_dtype),
        blocksize=blocksize,
        compress_statistics=use_double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
        bnb_quantized=True,
    )


def _stack_state(
    of_expert: bnb_functional.QuantState,
    absmax: torch.Tensor,
    shape: torch.Size,
    use_double_quant: bool,
    compute_dtype: torch.dtype | None,
) -> bnb_functional.QuantState:
    """The state of a whole stack: `of_expert`'s with all experts' scales, in 8 bits as bitsandbytes does it."""
    nested = {}
    if use_double_quant:
        offset = absmax.mean()
        absmax, state2 = bnb_functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        nested = {"offset": offset, "state2": state2}
    return bnb_functional.QuantState(
        absmax=absmax,
        shape=shape,
        dtype=compute_dtype or of_expert.dtype,
        blocksize=of_expert.blocksize,
        code=of_expert.code,
        quant_type=of_expert.quant_type,
        **nested,
    )


class _Room(threading.local):
    """Where a thread unpacks large experts to, one over the other. It is kept, as large as the largest of them."""

    memory: torch.Tensor | None = None

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = shape.numel() * dtype.itemsize
        if self.memory is None or len(self.memory) < num_bytes:
            with torch.inference_mode(False):  # what is made in that mode may not be written to outside
                self.memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self.memory[:num_bytes].view(dtype).view(shape)


_room = _Room()


def expert_unpacker(packed: Params4bit, in_place: bool = False) -> Callable[[int], torch.Tensor]:
    """A function from an expert's index to its dense matrix (`torch.Tensor` of shape `(O, I)`, in `compute_dtype`).

    The scales of all experts are unpacked here, once (a 32nd of the dense stack); the weights one expert a call.

    Args:
        packed (`Params4bit`): the stack.
        in_place (`bool`, defaults to `False`): a matrix may be overwritten by the next one that this thread unpacks so,
            of whichever stack.

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
    num_experts, matrix_shape = state.shape[0], torch.Size(state.shape[1:])
    bytes_E = packed.data.reshape(-1).view(torch.uint8).view(num_experts, -1, 1)
    absmax = state.absmax
    if state.nested:
        absmax = bnb_functional.dequantize_blockwise(absmax, state.state2) + state.offset
    absmax_E = absmax.float().view(num_experts, -1)
    # By rows, which bitsandbytes' CPU kernel shares out among threads; flat where rows are not whole blocks, whose
    # scales it mixes up (0.50.2). What filled the last block up is cut off.
    has_whole_rows = matrix_shape[-1] % state.blocksize == 0
    unpacked_shape = matrix_shape if has_whole_rows else torch.Size([2 * bytes_E.shape[1]])

    def dequantize(bytes_P1: torch.Tensor, absmax_N: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        some_state = bnb_functional.QuantState(
            absmax=absmax_N,
            shape=shape,
            dtype=state.dtype,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
        )
        return bnb_functional.dequantize_4bit(bytes_P1, some_state)

    def unpack(expert: int) -> torch.Tensor:
        weights = dequantize(bytes_E[expert], absmax_E[expert], unpacked_shape)
        return weights.view(-1)[: matrix_shape.numel()].view(matrix_shape)

    is_in_16_bits_on_cpu = packed.device.type == "cpu" and state.dtype.itemsize == 2
    if not (in_place and is_in_16_bits_on_cpu and has_whole_rows and matrix_shape.numel() >= LARGE_EXPERT):
        return unpack
    return _by_pieces(dequantize, bytes_E, absmax_E, _room.tensor(matrix_shape, state.dtype), state.blocksize)


def _by_pieces(
    dequantize: Callable, bytes_E: torch.Tensor, absmax_E: torch.Tensor, matrix_OI: torch.Tensor, blocksize: int
) -> Callable[[int], torch.Tensor]:
    """A function that unpacks an expert into `matrix_OI` by pieces of whole rows."""
    rows = max(1, PIECE // matrix_OI.shape[1])
    pieces_OI, num_weights = matrix_OI.split(rows), rows * matrix_OI.shape[1]

    def unpack(expert: int) -> torch.Tensor:
        bytes_of_pieces = bytes_E[expert].split(num_weights // 2)
        scales_of_pieces = absmax_E[expert].split(num_weights // blocksize)
        for piece_OI, bytes_P1, absmax_N in zip(pieces_OI, bytes_of_pieces, scales_of_pieces, strict=True):
            piece_OI.copy_(dequantize(bytes_P1, absmax_N, piece_OI.shape))
        return matrix_OI

    return unpack


def dense_stack(packed: Params4bit, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that the packed stack stands for (`torch.Tensor` of shape `(E, O, I)`), one expert at a time."""
    unpack = expert_unpacker(packed, in_place=True)
    weight_EOI = torch.empty(logical_shape(packed), dtype=dtype, device=packed.device)
    for expert, matrix_OI in enumerate(weight_EOI):
        matrix_OI.copy_(unpack(expert))
    return weight_EOI
