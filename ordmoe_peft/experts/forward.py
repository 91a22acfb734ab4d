"""The experts function `"ordmoe"`: one forward for every class of fused experts, dense or in 4 bits, with LoRA.

It takes the place of `grouped_mm_experts_forward` (`transformers/integrations/moe.py`) and reads the same flags. Dense
experts without an adapter are left to that, so a model's outputs do not change by a bit.

There are three ways to compute the others. [`~ordmoe_peft.experts.frozen.run_frozen_experts`] is the fast one on
CPU and for packed weights; few rows without gradients, as in decoding, go through
[`~ordmoe_peft.experts.few_rows.run_few_rows`] on CPU. Both need to know on the host which expert has how many rows.
Dense experts elsewhere, and experts that are trained themselves, run through `grouped_mm` and autograd, without a host
sync.

Shape suffixes as in `experts/__init__.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..quantization.storage import expert_unpacker, is_packed, logical_shape
from .few_rows import run_few_rows
from .frozen import FrozenExperts, LowRank, Projection, run_frozen_experts
from .grouped import grouped_lora, grouped_matmul
from .layout import ExpertGroups, ExpertSlots, combine_by_token, group_by_expert, lay_out_by_expert


# What the products of LoRA with one more bin of experts cost, as bytes of slots that they read and write, all widths
# together: measured on two CPU cores.
BIN_COST_BYTES = 600_000
# In 16 bits oneDNN compiles and keeps a kernel of about 0.6 MB for each number of rows that a product meets; rounding
# rows up to multiples of this makes them few.
ROW_STEP = 4
# What the up-projection's output takes of the slots that are worked on at a time, in bytes: many enough to be worth the
# operations, and few, so that little exists beside what is kept.
PART_BYTES = 2_000_000
# Routed rows up to which `run_few_rows` is the faster way without gradients: measured on two CPU cores.
FEW_ROWS = 160


@dataclass
class ExpertLora:
    """What wrappers of the projections hand to the experts function. No mapping, which hooks that move inputs between
    devices would copy.

    Args:
        updates (`dict`): projection name → the active adapters' factors.
        is_taken (`bool`): whether an experts function has taken them.
    """

    updates: dict[str, list[LowRank]]
    is_taken: bool = False


def taken(expert_lora: ExpertLora | None) -> dict[str, list[LowRank]]:
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
    expert_lora: "ExpertLora | None" = None,
) -> torch.Tensor:
    """Run each token through its K experts and sum their outputs by routing weight.

    Args:
        self (`nn.Module`): a class decorated with `transformers.integrations.use_experts_implementation`.
        hidden_states (`torch.Tensor` of shape `(T, H)`): tokens.
        top_k_index (`torch.Tensor` of shape `(T, K)`): each token's experts.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): their weights.
        expert_lora ([`ExpertLora`], *optional*): the active adapters' factors.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `hidden_states`.
    """
    if self._is_expert_parallel:
        raise OrdMoEModelError(
            f"{type(self).__name__} is sharded by expert parallelism, which OrdMoE's experts do not support: load the "
            "model without `ep_size`."
        )
    lora = taken(expert_lora)
    if self.down_proj.dim() != 3 and not is_packed(self.down_proj):
        raise OrdMoERuntimeError(
            f"{type(self).__name__} has 4-bit weights without their quantisation state, as replicas of nn.DataParallel "
            "have: use one process for each device (`accelerate launch`), or one device."
        )
    is_any_packed = any(is_packed(getattr(self, name)) for name in (_up_name(self), "down_proj"))
    if is_any_packed and is_trained(self):
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        raise OrdMoEModelError(
            f"{', '.join(trained)} of {type(self).__name__} want gradients, but its experts are packed in 4 bits and "
            "frozen. Freeze them (`requires_grad_(False)`), or train an unquantised model."
        )
    if not lora and not is_any_packed:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    is_on_cpu = self.down_proj.device.type == "cpu"
    if not is_any_packed and (not is_on_cpu or is_trained(self)):
        return grouped_forward(self, hidden_states, top_k_index, top_k_weights, lora)
    # Not in training: reentrant checkpointing's first forward has no gradients, and must be what the second is.
    is_without_gradients = not self.training and not torch.is_grad_enabled()
    is_few = is_on_cpu and is_without_gradients and 0 < top_k_index.numel() <= FEW_ROWS
    run = _few_rows_forward if is_few else _frozen_forward
    return run(self, hidden_states, top_k_index, top_k_weights, lora)


def is_trained(experts: nn.Module) -> bool:
    """Whether gradients of the experts' own parameters are asked for."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in experts.parameters())


def _up_name(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


@torch.compiler.disable(reason="OrdMoE lays rows out by expert on the host")
def _frozen_forward(
    experts: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, lora: dict
) -> torch.Tensor:
    return run_frozen_experts(x_TH, weights_TK, *frozen_step(experts, index_TK, lora))


@torch.compiler.disable(reason="OrdMoE puts rows in the order of their experts on the host")
def _few_rows_forward(
    experts: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, lora: dict
) -> torch.Tensor:
    return run_few_rows(x_TH, weights_TK, _frozen_experts(experts, lora), index_TK)


def frozen_step(
    experts: nn.Module, index_TK: torch.Tensor, lora: dict[str, list[LowRank]]
) -> tuple[FrozenExperts, ExpertSlots]:
    """What `run_frozen_experts` takes for these experts and this routing."""
    frozen = _frozen_experts(experts, lora)
    row_step = 1 if frozen.down.dtype.itemsize >= 4 else ROW_STEP
    features = sum(projection.in_features + projection.out_features for projection in (frozen.up, frozen.down))
    is_adapted = frozen.up.lora or frozen.down.lora
    bin_cost = BIN_COST_BYTES // (features * frozen.down.dtype.itemsize) if is_adapted else None
    part_size = PART_BYTES // (frozen.up.out_features * frozen.up.dtype.itemsize)
    return frozen, lay_out_by_expert(index_TK, experts.num_experts, bin_cost, row_step, part_size)


def _frozen_experts(experts: nn.Module, lora: dict[str, list[LowRank]]) -> FrozenExperts:
    up_lora, down_lora = (tuple(lora.get(name, ())) for name in (_up_name(experts), "down_proj"))
    return FrozenExperts(
        up=_projection(experts, _up_name(experts), up_lora),
        down=_projection(experts, "down_proj", down_lora),
        gate=experts._apply_gate if experts.has_gate else experts.act_fn,
        norm=experts.post_expert_norm if experts.has_post_expert_norm else None,
    )


def _projection(experts: nn.Module, name: str, lora: tuple[LowRank, ...]) -> Projection:
    weight, is_transposed = getattr(experts, name), experts.is_transposed
    dtype = weight.quant_state.dtype if is_packed(weight) else weight.dtype
    bias_EO = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
    open_weight = partial(_matrices, weight, is_transposed)
    in_features, out_features = logical_shape(weight)[1:] if is_transposed else reversed(logical_shape(weight)[1:])
    return Projection(open_weight, in_features, out_features, dtype, bias_EO, lora)


def _matrices(weight: torch.Tensor, is_transposed: bool) -> Callable[[int], torch.Tensor]:
    """Expert → its matrix (`torch.Tensor` of shape `(I, O)`)."""
    if is_packed(weight):
        unpack = expert_unpacker(weight, _piece_size(weight))
        return unpack if is_transposed else lambda expert: unpack(expert).t()
    return (weight.detach() if is_transposed else weight.detach().transpose(1, 2)).__getitem__


def _piece_size(weight: torch.Tensor) -> int | None:
    dtype, num_weights = weight.quant_state.dtype, logical_shape(weight)[1:].numel()
    is_large = weight.device.type == "cpu" and dtype.itemsize == 2 and num_weights >= 1 << 20
    return 1 << 18 if is_large else None


def grouped_forward(
    experts: nn.Module,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_lora: dict[str, list[LowRank]] | None = None,
) -> torch.Tensor:
    """[`experts_forward`] of dense experts through `grouped_mm`, LoRA too."""
    lora = expert_lora or {}
    groups = group_by_expert(index_TK, experts.num_experts)
    expert_N = index_TK.reshape(-1)[groups.order_N] if experts.has_bias else None

    def project(name: str, x_NI: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)
        x_NI = x_NI.to(weight.dtype)
        y_NO = grouped_matmul(x_NI, weight if experts.is_transposed else weight.transpose(1, 2), groups.ends_E)
        if experts.has_bias:
            y_NO = y_NO + getattr(experts, f"{name}_bias")[expert_N]
        for update in lora.get(name, ()):
            y_NO = y_NO + _lora(x_NI, update, groups)
        return y_NO.to(weight.dtype)

    rows_NF = project(_up_name(experts), x_TH[groups.token_N])
    rows_NF = experts._apply_gate(rows_NF) if experts.has_gate else experts.act_fn(rows_NF)
    rows_NH = project("down_proj", rows_NF)
    if experts.has_post_expert_norm:
        rows_NH = experts.post_expert_norm(rows_NH)
    rows_NH = rows_NH * weights_TK.reshape(-1)[groups.order_N].unsqueeze(-1)
    return combine_by_token(rows_NH, groups).to(x_TH.dtype)


def _lora(x_NI: torch.Tensor, update: LowRank, groups: ExpertGroups) -> torch.Tensor:
    A_ERI, B_EOR = update.A_ERI.to(x_NI.dtype), update.B_EOR.to(x_NI.dtype)
    return grouped_lora(x_NI, A_ERI, B_EOR, update.scaling, groups.ends_E)
