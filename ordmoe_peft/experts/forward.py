"""The experts function `"ordmoe"`: one forward for every class of fused experts, dense or in 4 bits, with LoRA.

It takes the place of `grouped_mm_experts_forward` (`transformers/integrations/moe.py`) and reads the same flags. Which
way the experts are computed is decided in [`experts_forward`] alone:

| experts | way |
| --- | --- |
| dense, without an adapter | transformers' `grouped_mm`: a model's outputs do not change by a bit |
| dense, trained themselves or not on CPU | `grouped.py`: `grouped_mm` and autograd, without a host sync |
| on CPU, few rows without gradients, as in decoding | `few_rows.py` |
| on CPU, and packed in 4 bits anywhere | `frozen.py`, chunk by chunk |

A further way takes what `frozen_step` gives, [`~ordmoe_peft.experts.frozen.FrozenExperts`] and a layout, and gets a row
here and a line in [`experts_forward`].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .._compat import activation_of, is_expert_parallel
from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..quantization.offloaded import at_hand, opener
from ..quantization.storage import expert_unpacker, is_packed, logical_shape
from .few_rows import run_few_rows
from .frozen import FrozenExperts, LowRank, Projection, run_frozen_experts
from .grouped import combine_by_token, group_by_expert, grouped_lora, grouped_matmul
from .layout import PaddedLayout, lay_out_by_expert
from .tuning import BIN_COST_BYTES, CHUNK_BYTES, FEW_ROWS, LARGE_EXPERT, PIECE, ROW_STEP


@dataclass
class LoraHandover:
    """What LoRA layers of the projections hand to the experts function. It is not a mapping, because hooks that move
    inputs between devices would copy one.

    Args:
        updates (`dict`): projection name → the active adapters' factors.
        is_taken (`bool`): whether an experts function has taken them.
    """

    updates: dict[str, list[LowRank]]
    is_taken: bool = False


def take_updates(expert_lora: LoraHandover | None) -> dict[str, list[LowRank]]:
    """The updates that an experts function was handed; it has them from now on."""
    if expert_lora is None:
        return {}
    expert_lora.is_taken = True
    return expert_lora.updates


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    expert_lora: LoraHandover | None = None,
) -> torch.Tensor:
    """Run each token through its K experts and sum their outputs by routing weight.

    Args:
        self (`nn.Module`): a class decorated with `transformers.integrations.use_experts_implementation`.
        hidden_states (`torch.Tensor` of shape `(T, H)`): tokens.
        top_k_index (`torch.Tensor` of shape `(T, K)`): each token's experts.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): their weights.
        expert_lora ([`LoraHandover`], *optional*): the active adapters' factors.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `hidden_states`.

    Raises:
        [`OrdMoEModelError`]: the experts are sharded by expert parallelism, or packed and to be trained.
        [`OrdMoERuntimeError`]: packed weights have lost their quantisation state.
    """
    lora = take_updates(expert_lora)
    names = up_name(self), "down_proj"
    is_any_packed = any(is_packed(getattr(self, name)) for name in names)
    check_experts(self, is_any_packed)
    if not lora and not is_any_packed:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    is_on_cpu = hidden_states.device.type == "cpu"
    if not is_any_packed and (not is_on_cpu or is_trained(self)):
        return grouped_forward(self, hidden_states, top_k_index, top_k_weights, lora)
    # Not in training: reentrant checkpointing's first forward has no gradients, and must compute what the second does.
    is_without_gradients = not self.training and not torch.is_grad_enabled()
    is_few = is_on_cpu and is_without_gradients and 0 < top_k_index.numel() <= FEW_ROWS
    run = _few_rows_forward if is_few else _frozen_forward
    return run(self, hidden_states, top_k_index, top_k_weights, lora)


def check_experts(experts: nn.Module, is_any_packed: bool) -> None:
    """Refuse experts that none of the ways can compute; see [`experts_forward`]."""
    if is_expert_parallel(experts):
        raise OrdMoEModelError(
            f"{type(experts).__name__} is sharded by expert parallelism, which OrdMoE's experts do not support: load "
            "the model without `ep_size`."
        )
    if experts.down_proj.dim() != 3 and not is_packed(experts.down_proj):
        raise OrdMoERuntimeError(
            f"{type(experts).__name__} has 4-bit weights without their quantisation state, as replicas of "
            "nn.DataParallel have: use one process for each device (`accelerate launch`), or one device."
        )
    if is_any_packed and is_trained(experts):
        trained = [name for name, parameter in experts.named_parameters() if parameter.requires_grad]
        raise OrdMoEModelError(
            f"{', '.join(trained)} of {type(experts).__name__} want gradients, but its experts are packed in 4 bits "
            "and frozen. Freeze them (`requires_grad_(False)`), or train an unquantised model."
        )


def up_name(experts: nn.Module) -> str:
    """What the up-projection is called."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def is_trained(experts: nn.Module) -> bool:
    """Whether gradients of the experts' own parameters are asked for."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in experts.parameters())


@torch.compiler.disable(reason="OrdMoE lays rows out by expert on the host")
def _frozen_forward(
    experts: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, lora: dict
) -> torch.Tensor:
    return run_frozen_experts(x_TH, weights_TK, *frozen_step(experts, index_TK, lora))


@torch.compiler.disable(reason="OrdMoE puts rows in the order of their experts on the host")
def _few_rows_forward(
    experts: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, lora: dict
) -> torch.Tensor:
    return run_few_rows(x_TH, weights_TK, frozen_experts(experts, lora, x_TH.device), index_TK)


def frozen_step(
    experts: nn.Module, index_TK: torch.Tensor, lora: dict[str, list[LowRank]]
) -> tuple[FrozenExperts, PaddedLayout]:
    """What `run_frozen_experts` takes for these experts and this routing."""
    frozen = frozen_experts(experts, lora, index_TK.device)
    up, down = frozen.up, frozen.down
    widths = up.in_features + up.out_features + down.in_features + down.out_features
    bin_cost = BIN_COST_BYTES // (widths * down.dtype.itemsize) if up.lora or down.lora else None
    row_step = 1 if down.dtype.itemsize >= 4 else ROW_STEP
    chunk_size = CHUNK_BYTES // (up.out_features * up.dtype.itemsize)
    return frozen, lay_out_by_expert(index_TK, experts.num_experts, bin_cost, row_step, chunk_size)


def frozen_experts(experts: nn.Module, lora: dict[str, list[LowRank]], device: torch.device) -> FrozenExperts:
    """The parts of these experts, with the updates of each projection, to be run on `device`."""
    names = up_name(experts), "down_proj"
    up, down = (_projection(experts, name, lora) for name in names)
    return FrozenExperts(
        up=up,
        down=down,
        gate=activation_of(experts),
        norm=experts.post_expert_norm if experts.has_post_expert_norm else None,
        at_hand=opener([getattr(experts, name) for name in names], device),
    )


def _projection(experts: nn.Module, name: str, lora: dict[str, list[LowRank]]) -> Projection:
    weight, is_transposed = getattr(experts, name), experts.is_transposed
    _, *features = logical_shape(weight)
    in_features, out_features = features if is_transposed else reversed(features)
    return Projection(
        open=partial(_matrices, weight, is_transposed),
        in_features=in_features,
        out_features=out_features,
        dtype=weight.quant_state.dtype if is_packed(weight) else weight.dtype,
        bias_EO=getattr(experts, f"{name}_bias").detach() if experts.has_bias else None,
        lora=tuple(lora.get(name, ())),
    )


def _matrices(weight: torch.Tensor, is_transposed: bool) -> Callable[[int], torch.Tensor]:
    """Expert → its matrix (`torch.Tensor` of shape `(I, O)`)."""
    weight = at_hand(weight)
    if not is_packed(weight):
        return (weight.detach() if is_transposed else weight.detach().transpose(1, 2)).__getitem__
    is_in_16_bits_on_cpu = weight.device.type == "cpu" and weight.quant_state.dtype.itemsize == 2
    is_large = is_in_16_bits_on_cpu and logical_shape(weight)[1:].numel() >= LARGE_EXPERT
    unpack = expert_unpacker(weight, PIECE if is_large else None)
    return unpack if is_transposed else lambda expert: unpack(expert).t()


def grouped_forward(
    experts: nn.Module,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    lora: dict[str, list[LowRank]],
) -> torch.Tensor:
    """[`experts_forward`] of dense experts through `grouped_mm`, LoRA too; `lora` has each projection's updates."""
    order_N, ends_E = group_by_expert(index_TK, experts.num_experts)
    top_k = index_TK.shape[-1]

    def project(name: str, x_NI: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)
        x_NI = x_NI.to(weight.dtype)
        y_NO = grouped_matmul(x_NI, weight if experts.is_transposed else weight.transpose(1, 2), ends_E)
        if experts.has_bias:
            y_NO = y_NO + getattr(experts, f"{name}_bias")[index_TK.reshape(-1)[order_N]]
        for update in lora.get(name, ()):
            y_NO = y_NO + grouped_lora(x_NI, update, ends_E)
        return y_NO.to(weight.dtype)

    rows_NF = activation_of(experts)(project(up_name(experts), x_TH[order_N // top_k]))
    rows_NH = project("down_proj", rows_NF)
    if experts.has_post_expert_norm:
        rows_NH = experts.post_expert_norm(rows_NH)
    rows_NH = rows_NH * weights_TK.reshape(-1)[order_N].unsqueeze(-1)
    return combine_by_token(rows_NH, order_N, top_k).to(x_TH.dtype)
