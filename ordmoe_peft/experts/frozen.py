"""Frozen experts with low-rank updates as one differentiable function, where the host knows each expert's rows.

A base product is one batched product for each block of experts, whose matrices exist at a time: as many as a budget
holds on a GPU, where operations are few and large, and one on the CPU (`tuning.py`). The products with LoRA's factors
are batched over a bin of experts (`layout.py`). Work goes through one chunk of the experts after the other, so that
little exists beside what is kept.

Kept for backward are the tokens, the up-projection's output, and products with R columns. Frozen weights are kept by
reference, and packed ones are unpacked again. The gate is run again. Nothing of width H per routed row is kept: the
gradient of a routing weight is taken before the down-projection, as ⟨g, a W⟩ = ⟨g Wᵀ, a⟩.

Shape suffixes as in `experts/__init__.py`; S slots, M slots of a chunk, P experts in the order of their slots, B
experts of a bin, C experts of a block ([`~ordmoe_peft.experts.layout.PaddedLayout`]), G tokens and a row of zeros for
gaps.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .layout import ExpertChunk, Experts, PaddedLayout, with_gap


@dataclass(frozen=True)
class LowRank:
    """The low-rank update of one projection of all experts, in PEFT's layout.

    Args:
        A (`torch.Tensor` of shape `(E·R, I)`): rows run over (expert, r).
        B (`torch.Tensor` of shape `(O, R·E)`): columns run over (r, expert).
        num_experts (`int`): E.
        scaling (`float`): alpha / r, or alpha / √r with rsLoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    num_experts: int
    scaling: float

    @property
    def r(self) -> int:
        return self.B.shape[1] // self.num_experts

    @property
    def A_ERI(self) -> torch.Tensor:
        return self.A.view(self.num_experts, self.r, -1)

    @property
    def B_EOR(self) -> torch.Tensor:
        return self.B.view(-1, self.r, self.num_experts).permute(2, 0, 1)


@dataclass(frozen=True)
class Projection:
    """One frozen projection of all experts.

    Args:
        open (`Callable`): returns a function from experts, a `slice` or a `torch.Tensor` of shape `(C,)`, to their
            matrices, a `torch.Tensor` of shape `(C, I, O)` in `dtype`. Called in forward and again in backward, so that
            what it makes for all experts at once, as 4-bit scales, is not kept between. With `all_scales=False` nothing
            is made for all, which is for where few are asked for.
        in_features (`int`), out_features (`int`): I and O.
        dtype (`torch.dtype`): of the products.
        bias_EO (`torch.Tensor` of shape `(E, O)`, *optional*): frozen, too.
        lora (`tuple` of [`LowRank`]): updates that are added.
    """

    open: Callable[..., Callable[[Experts], torch.Tensor]]
    in_features: int
    out_features: int
    dtype: torch.dtype
    bias_EO: torch.Tensor | None = None
    lora: tuple[LowRank, ...] = ()


@dataclass(frozen=True)
class FrozenExperts:
    """Up-projection, gate, down-projection, norm.

    Args:
        up, down ([`Projection`]): the projections.
        gate (`Callable`): `(S, up.out_features)` → `(S, F)`, the gate or the activation; each row by itself.
        norm (`Callable`, *optional*): what each expert's output goes through.
        at_hand (`Callable`): returns a context within which the projections can be opened and read, forward and again
            backward; what is in RAM is on the device there.
    """

    up: Projection
    down: Projection
    gate: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    at_hand: Callable[[], AbstractContextManager] = nullcontext


def run_frozen_experts(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, experts: FrozenExperts, layout: PaddedLayout
) -> torch.Tensor:
    """Each token through its experts, summed by routing weight.

    Differentiable once, in `x_TH`, `weights_TK` and the factors of `experts`.

    Args:
        x_TH (`torch.Tensor` of shape `(T, H)`): tokens.
        weights_TK (`torch.Tensor` of shape `(T, K)`): routing weights.
        experts ([`FrozenExperts`]): what to run.
        layout ([`~ordmoe_peft.experts.layout.PaddedLayout`]): which rows go to which expert.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `x_TH`.
    """
    factors = [factor for lora in (*experts.up.lora, *experts.down.lora) for factor in (lora.A, lora.B)]
    return _FrozenExperts.apply(experts, layout, x_TH, weights_TK, *factors)


def weighted_sum_(y_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The sum of each token's rows by routing weight (`torch.Tensor` of shape `(T, H)`). Writes into `y_TKH`.

    As transformers does it, rounding included: an adapter that is 0 changes no bit.
    """
    in_place = torch.result_type(y_TKH, weights_TK) == y_TKH.dtype
    return (y_TKH.mul_ if in_place else y_TKH.mul)(weights_TK.unsqueeze(-1)).sum(dim=1)


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: FrozenExperts, layout: PaddedLayout, x_TH: Any, weights_TK: Any, *factors: Any):
        # Autocast knows some of these operators and not others: all are in the weights' dtype, as grouped_mm is.
        with torch.autocast(x_TH.device.type, enabled=False), experts.at_hand():
            x_GH = with_gap(x_TH.to(experts.up.dtype))
            up, down = (ProjectionPass(projection, layout) for projection in (experts.up, experts.down))
            up_SO, down_SH = (
                x_TH.new_empty(len(layout.token_S), projection.out_features, dtype=projection.dtype)
                for projection in (experts.up, experts.down)
            )
            for chunk in layout.chunks:
                up_MO = up_SO[chunk.slots]
                up.forward(chunk, layout.rows(chunk, x_GH), up_MO)
                down.forward(chunk, experts.gate(up_MO).to(experts.down.dtype), down_SH[chunk.slots])
            y_SH = down_SH if experts.norm is None else experts.norm(down_SH)
            y_TH = weighted_sum_(layout.by_token(y_SH), weights_TK).to(x_TH.dtype)
        ctx.experts, ctx.layout = experts, layout
        kept_SH = None if experts.norm is None else down_SH
        ctx.save_for_backward(x_TH, weights_TK, up_SO, kept_SH, *up.kept(), *down.kept(), *factors)
        return y_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor):
        experts, layout = ctx.experts, ctx.layout
        saved = ctx.saved_tensors  # read once: checkpointing refuses a second time
        kept, factors = saved[:4], saved[4:]
        num_up, num_down = 2 * len(experts.up.lora), 2 * len(experts.down.lora)
        _, _, needs_x, needs_weights, *needs = ctx.needs_input_grad
        with torch.autocast(grad_TH.device.type, enabled=False), experts.at_hand():
            up = ProjectionPass(experts.up, layout, factors[:num_up], needs[:num_up])
            down = ProjectionPass(experts.down, layout, factors[num_up : num_up + num_down], needs[num_up:])
            grad_x_TH, grad_weights_TK = _back_through_chunks(up, down, experts, kept, grad_TH, needs_x)
            factor_grads = *up.take_factor_grads(), *down.take_factor_grads()
        return None, None, grad_x_TH, grad_weights_TK if needs_weights else None, *factor_grads


def _back_through_chunks(
    up: "ProjectionPass",
    down: "ProjectionPass",
    experts: FrozenExperts,
    kept: Sequence[torch.Tensor],
    grad_TH: torch.Tensor,
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of the tokens, where they are needed, and of the routing weights. `up` and `down` note those of
    their factors."""
    layout, (x_TH, weights_TK, up_SO, down_SH) = up.layout, kept
    x_GH, grad_GH = with_gap(x_TH.to(experts.up.dtype)), with_gap(grad_TH.to(experts.down.dtype))
    weight_S = weights_TK.new_zeros(len(layout.token_S)).index_copy_(0, layout.slot_N, weights_TK.reshape(-1))
    weight_S1 = weight_S.to(grad_GH.dtype).unsqueeze(1)
    grad_weight_S1 = torch.empty_like(weight_S1)
    grad_x_SH = x_GH.new_empty(len(layout.token_S), x_TH.shape[-1]) if needs_x else None
    for chunk in layout.chunks:
        grad_MH, weight_M1 = layout.rows(chunk, grad_GH), weight_S1[chunk.slots]
        if experts.norm is not None:
            y_MH, through_norm = _rerun(experts.norm, down_SH[chunk.slots])
            grad_weight_S1[chunk.slots] = (grad_MH * y_MH).sum(dim=-1, keepdim=True)
            grad_MH, weight_M1 = through_norm(grad_MH * weight_M1), torch.ones_like(weight_M1)
        grad_a_MF = grad_MH.new_empty(len(grad_MH), experts.down.in_features)
        down_small_grads = down.input_grad(chunk, grad_MH, grad_a_MF)
        a_MF, through_gate = _rerun(experts.gate, up_SO[chunk.slots])
        if experts.norm is None:
            grad_weight_S1[chunk.slots] = (grad_a_MF * a_MF).sum(dim=-1, keepdim=True)
            if experts.down.bias_EO is not None:
                for block, grad_CMH, weight_CM1 in chunk.by_block(grad_MH, grad_weight_S1[chunk.slots]):
                    weight_CM1 += grad_CMH @ experts.down.bias_EO[block].to(grad_CMH.dtype).unsqueeze(-1)
        down.add_factor_grads(chunk, a_MF, grad_MH, down_small_grads, weight_M1)
        if not needs_x and not up.needs_factors:
            continue
        del grad_MH
        grad_up_MO = through_gate(grad_a_MF.mul_(weight_M1))
        up_small_grads = up.input_grad(chunk, grad_up_MO, None if grad_x_SH is None else grad_x_SH[chunk.slots])
        if up.needs_factors:
            up.add_factor_grads(chunk, layout.rows(chunk, x_GH), grad_up_MO, up_small_grads)
    grad_x_TH = None if grad_x_SH is None else layout.sum_by_token(grad_x_SH).to(x_TH.dtype)
    return grad_x_TH, layout.by_token(grad_weight_S1).squeeze(-1).to(weights_TK.dtype)


class ProjectionPass:
    """A projection on its way through the slots, forward or backward.

    Args:
        projection ([`Projection`]): what to run.
        layout ([`~ordmoe_peft.experts.layout.PaddedLayout`]): through what.
        kept (`Sequence` of `torch.Tensor`, *optional*): in backward, what [`kept`] of the forward's pass was.
        needs (`Sequence` of `bool`, defaults to none): whether gradients of each update's A and B are asked for.
    """

    def __init__(
        self,
        projection: Projection,
        layout: PaddedLayout,
        kept: Sequence[torch.Tensor] = (),
        needs: Sequence[bool] = (),
    ):
        self.projection, self.layout, self.needs_factors = projection, layout, any(needs)
        self.matrices = projection.open()
        pairs = range(0, 2 * len(projection.lora), 2)
        self.lora = [
            _LoraPass(lora, layout, projection.dtype, kept[place : place + 2], needs[place : place + 2])
            for lora, place in zip(projection.lora, pairs, strict=True)
        ]

    def kept(self) -> list[torch.Tensor]:
        """What backward needs of each update: scaled `x Aᵀ` (S, R) and B (P, R, O)."""
        return [tensor for lora in self.lora for tensor in (lora.small_SR, lora.B_PRO)]

    def forward(self, chunk: ExpertChunk, x_MI: torch.Tensor, y_MO: torch.Tensor) -> None:
        """Write the output of a chunk's slots into `y_MO`."""
        bias_EO = self.projection.bias_EO
        for experts, x_CMI, y_CMO in chunk.by_block(x_MI, y_MO):
            _multiply(x_CMI, self.matrices(experts), out=y_CMO)
            if bias_EO is not None:
                y_CMO += bias_EO[experts].unsqueeze(1)
        chunk.zero_rest_(y_MO)
        for lora in self.lora:
            small_MR = _times(chunk, x_MI, lora.A_PRI, lora.scaling, out=lora.small_SR[chunk.slots])
            _add_product(chunk, y_MO, small_MR, lora.B_PRO)

    def input_grad(self, chunk: ExpertChunk, grad_MO: torch.Tensor, grad_MI: torch.Tensor | None) -> list[torch.Tensor]:
        """Scaled `grad B` (M, R) of each update. Writes the gradient of a chunk's input into `grad_MI`, if given."""
        if grad_MI is not None:
            for experts, grad_CMO, grad_CMI in chunk.by_block(grad_MO, grad_MI):
                _multiply(grad_CMO, self.matrices(experts).transpose(1, 2), out=grad_CMI)
            chunk.zero_rest_(grad_MI)
        small_grads = []
        for lora in self.lora:
            small_grads.append(_times(chunk, grad_MO, lora.B_PRO, lora.scaling))
            if grad_MI is not None:
                _add_product(chunk, grad_MI, small_grads[-1], lora.A_PRI)
        return small_grads

    def add_factor_grads(
        self,
        chunk: ExpertChunk,
        x_MI: torch.Tensor,
        grad_MO: torch.Tensor,
        small_grads: list[torch.Tensor],
        weight_M1: torch.Tensor | None = None,
    ) -> None:
        """Note the gradients of a chunk's factors. `grad_MO` is yet to be scaled by `weight_M1`, if given.

        Of an expert, with its slots as rows: ∂A = (weight · scaling · grad B)ᵀ x, ∂B = (weight · scaling · x Aᵀ)ᵀ grad.
        """

        def weighted(small_MR: torch.Tensor) -> torch.Tensor:
            return small_MR if weight_M1 is None else small_MR * weight_M1

        for lora, small_grad_MR in zip(self.lora, small_grads, strict=True):
            if lora.grad_A_PRI is not None:
                _outer(chunk, weighted(small_grad_MR), x_MI, out=lora.grad_A_PRI)
            if lora.grad_B_PRO is not None:
                _outer(chunk, weighted(lora.small_SR[chunk.slots]), grad_MO, out=lora.grad_B_PRO)

    def take_factor_grads(self) -> list[torch.Tensor | None]:
        """Gradients of each update's A and B, as they are stored."""
        return [grad for lora in self.lora for grad in (lora.take_grad_A(), lora.take_grad_B())]


class _LoraPass:
    """The factors of one update in the order of slots and in the products' dtype, what the forward keeps, and the
    factors' gradients. See [`ProjectionPass`]."""

    def __init__(
        self,
        lora: LowRank,
        layout: PaddedLayout,
        dtype: torch.dtype,
        kept: Sequence[torch.Tensor],
        needs: Sequence[bool],
    ):
        self.lora, self.layout, self.scaling = lora, layout, lora.scaling
        A_ERI = lora.A_ERI.detach()
        is_any_absent = len(layout.expert_P) < lora.num_experts  # then cast what is there alone
        A_ERI = A_ERI if is_any_absent else A_ERI.to(dtype)
        self.A_PRI: Any = A_ERI.index_select(0, layout.expert_P).to(dtype)
        self.small_SR, self.B_PRO = kept or (
            self.A_PRI.new_empty(len(layout.token_S), lora.r),
            self._B_of_experts(dtype),
        )
        grads = (
            layout.empty_for(lora.num_experts, factor) if needed else None
            for factor, needed in zip((self.A_PRI, self.B_PRO), needs or (False, False), strict=True)
        )
        self.grad_A_PRI, self.grad_B_PRO = grads

    def _B_of_experts(self, dtype: torch.dtype) -> torch.Tensor:
        """B of the experts in the order of their slots, transposed (`torch.Tensor` of shape `(P, R, O)`)."""
        lora, expert_P = self.lora, self.layout.expert_P
        row_PR = expert_P.unsqueeze(1) + lora.num_experts * torch.arange(lora.r, device=expert_P.device)
        if 2 * len(expert_P) <= lora.num_experts:  # nothing is computed of the many that are absent
            return lora.B.detach().index_select(1, row_PR.view(-1)).to(dtype).t().contiguous().view(*row_PR.shape, -1)
        B_XO = lora.B.detach().to(dtype).t().contiguous()
        return B_XO.index_select(0, row_PR.view(-1)).view(-1, lora.r, B_XO.shape[-1])

    # Each form of a gradient is freed as soon as the next one exists.
    def take_grad_A(self) -> torch.Tensor | None:
        self.A_PRI = None
        if self.grad_A_PRI is None:
            return None
        grad_A_ERI, self.grad_A_PRI = self.layout.by_expert(self.grad_A_PRI, self.lora.num_experts), None
        return grad_A_ERI.view(self.lora.A.shape).to(self.lora.A.dtype)

    def take_grad_B(self) -> torch.Tensor | None:
        if self.grad_B_PRO is None:
            return None
        grad_B_REO = self.layout.by_expert(self.grad_B_PRO, self.lora.num_experts, r_first=True)
        self.grad_B_PRO = None
        # Two dimensions in 16 bits are what torch transposes fast.
        grad_B_OX = grad_B_REO.view(self.lora.B.shape[::-1]).t().contiguous()
        del grad_B_REO
        return grad_B_OX.to(self.lora.B.dtype)


def _multiply(x_CMI: torch.Tensor, matrix_CIO: torch.Tensor, out: torch.Tensor) -> None:
    """The rows of each expert times its matrix, into `out` (`torch.Tensor` of shape `(C, M, O)`)."""
    if len(x_CMI) == 1:
        torch.mm(x_CMI[0], matrix_CIO[0], out=out[0])
    else:
        torch.bmm(x_CMI, matrix_CIO, out=out)


def _times(
    chunk: ExpertChunk, x_MI: torch.Tensor, factor_PRI: torch.Tensor, scaling: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each slot times its expert's factor, scaled (`torch.Tensor` of shape `(M, R)`)."""
    small_MR = x_MI.new_empty(len(x_MI), factor_PRI.shape[1]) if out is None else out
    bins = zip(chunk.by_bin(x_MI), chunk.factors_by_bin(factor_PRI), chunk.by_bin(small_MR), strict=True)
    for x_BMI, factor_BRI, small_BMR in bins:
        torch.bmm(x_BMI, factor_BRI.transpose(1, 2), out=small_BMR)
    return small_MR.mul_(scaling)


def _add_product(chunk: ExpertChunk, y_MI: torch.Tensor, small_MR: torch.Tensor, factor_PRI: torch.Tensor) -> None:
    """Add to each slot what its R columns times its expert's factor give."""
    bins = zip(chunk.by_bin(y_MI), chunk.by_bin(small_MR), chunk.factors_by_bin(factor_PRI), strict=True)
    for y_BMI, small_BMR, factor_BRI in bins:
        y_BMI.baddbmm_(small_BMR, factor_BRI)


def _outer(chunk: ExpertChunk, small_MR: torch.Tensor, x_MI: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of each expert's outer products into its place in `out` (`torch.Tensor` of shape `(P, R, I)`)."""
    bins = zip(chunk.by_bin(small_MR), chunk.by_bin(x_MI), chunk.factors_by_bin(out), strict=True)
    for small_BMR, x_BMI, out_BRI in bins:
        torch.bmm(small_BMR.transpose(1, 2), x_BMI, out=out_BRI)


def _rerun(function: Callable, x_SI: torch.Tensor) -> tuple[torch.Tensor, Callable]:
    """`function(x)`, and what takes the gradient of that to the gradient of x."""
    with torch.enable_grad():
        leaf_SI = x_SI.detach().requires_grad_()
        y_SO = function(leaf_SI)
    return y_SO.detach(), lambda grad_SO: torch.autograd.grad(y_SO, leaf_SI, grad_SO.to(y_SO.dtype))[0]
