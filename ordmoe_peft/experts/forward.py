"""The experts function `"ordmoe"`: one forward for every class of fused experts, dense or in 4 bits, with LoRA.

It takes the place of `grouped_mm_experts_forward` (`transformers/integrations/moe.py`) and reads the same flags. Which
way the experts are computed is decided in [`experts_forward`] alone:

| experts | way |
| --- | --- |
| dense, without an adapter | transformers' `grouped_mm`: a model's outputs do not change by a bit |
| dense, trained themselves, or where `grouped_mm` is one kernel | `grouped.py`: `grouped_mm` and autograd |
| few rows without gradients, as in decoding | `few_rows.py` on CPU, `row_by_row.py` elsewhere |
| all others: packed in 4 bits, or dense where `grouped_mm` is a loop on the host | `frozen.py`, chunk by chunk |
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .._compat import activation_of, is_expert_parallel
from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..quantization.offloaded import at_hand, opener
from ..quantization.storage import Unpacker, is_packed, logical_shape, stack_unpacker
from .few_rows import run_few_rows
from .frozen import FrozenExperts, LowRank, Projection, run_frozen_experts
from .grouped import combine_by_token, grouped_lora, grouped_matmul
from .layout import PaddedLayout, group_by_expert, lay_out_by_expert
from .row_by_row import run_row_by_row
from .tuning import FEW_ROWS, LARGE_EXPERT, PIECE, WorkSizes, has_grouped_kernel, work_sizes


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
    device = hidden_states.device
    if not is_any_packed and (is_trained(self) or has_grouped_kernel(device, self.down_proj.dtype)):
        return grouped_forward(self, hidden_states, top_k_index, top_k_weights, lora)
    return forward_on_host(self, hidden_states, top_k_index, top_k_weights, lora)


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
def forward_on_host(
    experts: nn.Module,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    lora: dict[str, list[LowRank]],
    sizes: WorkSizes | None = None,
) -> torch.Tensor:
    """[`experts_forward`] of frozen experts; `sizes` are those of the tokens' device by default."""
    sizes = sizes or work_sizes(x_TH.device)
    frozen = frozen_experts(experts, lora, x_TH.device)
    # Not in training: reentrant checkpointing's first forward has no gradients, and must compute what the second does.
    is_without_gradients = not experts.training and not torch.is_grad_enabled()
    if is_without_gradients and 0 < index_TK.numel() <= most_few_rows(frozen, sizes, index_TK.shape[1]):
        run = run_few_rows if sizes.matrices is None else run_row_by_row
        return run(x_TH, weights_TK, frozen, index_TK)
    return run_frozen_experts(x_TH, weights_TK, frozen, _layout(frozen, index_TK, experts.num_experts, sizes))


def most_few_rows(frozen: FrozenExperts, sizes: WorkSizes, top_k: int) -> int:
    """Routed rows up to which they are few: on GPUs each gets a matrix of its own, and all of these exist at a time.
    One token's always are, so that the host need not wait in decoding."""
    return FEW_ROWS if sizes.matrices is None else max(top_k, sizes.matrices // _matrix_bytes(frozen))


def frozen_step(
    experts: nn.Module, index_TK: torch.Tensor, lora: dict[str, list[LowRank]], sizes: WorkSizes
) -> tuple[FrozenExperts, PaddedLayout]:
    """What `run_frozen_experts` takes for these experts and this routing."""
    frozen = frozen_experts(experts, lora, index_TK.device)
    return frozen, _layout(frozen, index_TK, experts.num_experts, sizes)


def _layout(frozen: FrozenExperts, index_TK: torch.Tensor, num_experts: int, sizes: WorkSizes) -> PaddedLayout:
    up, down = frozen.up, frozen.down
    widths = up.in_features + up.out_features + down.in_features + down.out_features
    has_bins = bool(up.lora or down.lora) or sizes.matrices is not None
    return lay_out_by_expert(
        index_TK,
        num_experts,
        bin_cost=sizes.bin_cost // (widths * down.dtype.itemsize) if has_bins else None,
        row_step=1 if down.dtype.itemsize >= 4 else sizes.row_step,
        chunk_size=sizes.slots // (up.out_features * up.dtype.itemsize),
        block_experts=None if sizes.matrices is None else max(1, sizes.matrices // _matrix_bytes(frozen)),
    )


def _matrix_bytes(frozen: FrozenExperts) -> int:
    """The larger of an expert's two matrices."""
    return max(part.in_features * part.out_features * part.dtype.itemsize for part in (frozen.up, frozen.down))


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


def _matrices(weight: torch.Tensor, is_transposed: bool, all_scales: bool = True) -> Unpacker:
    """Experts → their matrices (`torch.Tensor` of shape `(C, I, O)`); `all_scales` as of `stack_unpacker`."""
    weight = at_hand(weight)
    if not is_packed(weight):
        return (weight.detach() if is_transposed else weight.detach().transpose(1, 2)).__getitem__
    is_in_16_bits_on_cpu = weight.device.type == "cpu" and weight.quant_state.dtype.itemsize == 2
    is_large = is_in_16_bits_on_cpu and logical_shape(weight)[1:].numel() >= LARGE_EXPERT
    unpack = stack_unpacker(weight, PIECE if is_large else None, all_scales)
    return unpack if is_transposed else lambda experts: unpack(experts).transpose(1, 2)


def grouped_forward(
    experts: nn.Module,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    lora: dict[str, list[LowRank]],
) -> torch.Tensor:
    """[`experts_forward`] of dense experts through `grouped_mm`, LoRA too; `lora` has each projection's updates."""
    order_N, _, ends_E = group_by_expert(index_TK, experts.num_experts)
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
