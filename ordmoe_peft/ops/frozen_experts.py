"""Frozen experts with low-rank updates as one differentiable function: what to compute forward, what to keep, and how
to come back.

Where the host knows which expert has which rows (always on CPU, and for packed weights, which are unpacked expert by
expert), a base product is one `torch.mm` per expert that has rows, on a block of contiguous rows, as `grouped_mm` does
on CPU. The products with LoRA's factors are too small for that: they are batched over bins of experts
(`ops/dispatch.py`).

Kept for backward are the tokens, the up-projection's output, and products with R columns. Frozen weights are kept by
reference, and packed ones are unpacked again. The gate is run again. Nothing of width H per routed row is kept: the
gradient of a routing weight is taken before the down-projection, as ⟨g, a W⟩ = ⟨g Wᵀ, a⟩.

Shape suffixes as in `ops/__init__.py`; S slots, P experts in the order of their slots, and in a bin B experts of M
slots (`ExpertBins`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .dispatch import ExpertBins


# Rows that go back through the gate at a time.
GATE_ROWS = 512


@dataclass(frozen=True)
class LowRank:
    """The low-rank update of one projection of all experts, in PEFT's layout.

    Args:
        A (`torch.Tensor` of shape `(E·R, I)`): rows run over (expert, r).
        B (`torch.Tensor` of shape `(O, R·E)`): columns run over (r, expert).
        num_experts (`int`): E.
        scaling (`float`): alpha / r, or alpha / √r with rsLoRA.
        B_REO (`torch.Tensor` of shape `(R, E, O)`, *optional*): `B` transposed, in the dtype of the products, where it
            is at hand.
    """

    A: torch.Tensor
    B: torch.Tensor
    num_experts: int
    scaling: float
    B_REO: torch.Tensor | None = None

    @property
    def r(self) -> int:
        return self.B.shape[1] // self.num_experts

    @property
    def A_ERI(self) -> torch.Tensor:
        return self.A.view(self.num_experts, self.r, -1)

    @property
    def B_EOR(self) -> torch.Tensor:
        return self.B.view(-1, self.r, self.num_experts).permute(2, 0, 1)


def transposed_B(lora: LowRank, dtype: torch.dtype) -> torch.Tensor:
    """`B` with columns as rows (`torch.Tensor` of shape `(R, E, O)`), which products can read as it is."""
    if lora.B_REO is not None and lora.B_REO.dtype == dtype:
        return lora.B_REO
    return lora.B.detach().to(dtype).t().contiguous().view(lora.r, lora.num_experts, -1)


@dataclass(frozen=True)
class Projection:
    """One frozen projection of all experts.

    Args:
        open (`Callable`): returns a function expert → `torch.Tensor` of shape `(I, O)`, in `dtype`. Called in forward
            and again in backward, so that what it makes for all experts at once, as 4-bit scales, is not kept between.
        in_features (`int`), out_features (`int`): I and O.
        dtype (`torch.dtype`): of the products.
        bias_EO (`torch.Tensor` of shape `(E, O)`, *optional*): frozen, too.
        lora (`tuple` of [`LowRank`]): updates that are added.
    """

    open: Callable[[], Callable[[int], torch.Tensor]]
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
    """

    up: Projection
    down: Projection
    gate: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None


def run_frozen_experts(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, experts: FrozenExperts, bins: ExpertBins
) -> torch.Tensor:
    """Each token through its experts, summed by routing weight.

    Differentiable once, in `x_TH`, `weights_TK` and the factors of `experts`.

    Args:
        x_TH (`torch.Tensor` of shape `(T, H)`): tokens.
        weights_TK (`torch.Tensor` of shape `(T, K)`): routing weights.
        experts ([`FrozenExperts`]): what to run.
        bins ([`ExpertBins`]): which rows go to which expert.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `x_TH`.
    """
    factors = [factor for lora in (*experts.up.lora, *experts.down.lora) for factor in (lora.A, lora.B)]
    return _FrozenExperts.apply(experts, bins, x_TH, weights_TK, *factors)


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, experts, bins, x_TH, weights_TK, *factors):
        up, down = experts.up, experts.down
        # Autocast knows some of these operators and not others: all are in the weights' dtype, as grouped_mm is.
        with torch.autocast(x_TH.device.type, enabled=False):
            up_SO, *saved_up = _project(up, bins.rows(x_TH.to(up.dtype)), bins)
            down_SH, *saved_down = _project(down, experts.gate(up_SO).to(down.dtype), bins, experts.norm is not None)
            y_SH = down_SH if experts.norm is None else experts.norm(down_SH)
            # Weighted and summed as transformers does it, rounding included: an adapter that is 0 changes no bit.
            y_TKH = bins.by_token(y_SH)
            in_place = torch.result_type(y_TKH, weights_TK) == y_TKH.dtype
            y_TKH = (y_TKH.mul_ if in_place else y_TKH.mul)(weights_TK.unsqueeze(-1))
            y_TH = y_TKH.sum(dim=1).to(x_TH.dtype)
        ctx.experts, ctx.bins = experts, bins
        kept_SH = None if experts.norm is None else down_SH
        ctx.save_for_backward(x_TH, weights_TK, up_SO, kept_SH, *saved_up, *saved_down, *factors)
        return y_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        up, down, bins = ctx.experts.up, ctx.experts.down, ctx.bins
        x_TH, weights_TK, up_SO, down_SH, *saved = ctx.saved_tensors
        saved_up, saved_down = saved[: 2 * len(up.lora)], saved[2 * len(up.lora) : 2 * len(up.lora + down.lora)]
        _, _, needs_x, needs_weights, *needs = ctx.needs_input_grad
        needs_up, needs_down = needs[: 2 * len(up.lora)], needs[2 * len(up.lora) :]

        with torch.autocast(x_TH.device.type, enabled=False):
            weight_S = weights_TK.new_zeros(len(bins.token_S)).index_copy_(0, bins.slot_N, weights_TK.reshape(-1))
            weight_S1 = weight_S.to(down.dtype).unsqueeze(1)  # 0 in gaps, so that these count for nothing
            grad_SH = bins.rows(grad_TH.to(down.dtype))
            if ctx.experts.norm is not None:
                y_SH, through_norm = _rerun(ctx.experts.norm, down_SH)
                grad_weight_S = (grad_SH * y_SH).sum(dim=-1)
                grad_SH, weight_S1 = through_norm(grad_SH * weight_S1), torch.ones_like(weight_S1)

            grad_a_SF, *small_grads = _input_grad(down, grad_SH, saved_down, bins)
            needs_up_grad = needs_x or any(needs_up)
            a_SF, gated_weight_S, grad_up_SO = _gate_back(ctx.experts, up_SO, grad_a_SF, weight_S1, needs_up_grad)
            del grad_a_SF
            if ctx.experts.norm is None:
                grad_weight_S = gated_weight_S
                if down.bias_EO is not None:
                    grad_weight_S = grad_weight_S + (grad_SH * bins.of_slots(down.bias_EO)).sum(dim=-1)
            grads_down = _factor_grads(down, needs_down, a_SF, grad_SH, saved_down, small_grads, bins, weight_S1)
            del a_SF, grad_SH

            grads_up, grad_TH = [None] * len(needs_up), None
            if needs_up_grad:
                grad_x_SH, *small_grads = _input_grad(up, grad_up_SO, saved_up, bins, needs_x, gaps_count=False)
                grad_TH = bins.sum_by_token(grad_x_SH).to(x_TH.dtype) if needs_x else None
                del grad_x_SH
                x_SH = bins.rows(x_TH.to(up.dtype)) if any(needs_up) else None
                grads_up = _factor_grads(up, needs_up, x_SH, grad_up_SO, saved_up, small_grads, bins)
            grad_weights = bins.by_token(grad_weight_S.unsqueeze(1)).squeeze(-1).to(weights_TK.dtype)
        return None, None, grad_TH, grad_weights if needs_weights else None, *grads_up, *grads_down


def _project(
    projection: Projection, x_SI: torch.Tensor, bins: ExpertBins, gaps_count: bool = True
) -> list[torch.Tensor]:
    """The projection's output and, for each update, what backward needs: scaled `x Aᵀ` (S, R), and `B` (P, R, O)."""
    y_SO, matrix = x_SI.new_empty(len(x_SI), projection.out_features), projection.open()
    for expert, x_MI, y_MO in bins.blocks(x_SI, y_SO):
        torch.mm(x_MI, matrix(expert), out=y_MO)
    if gaps_count:  # what memory held there may be no number, which times 0 is none either
        bins.blank_gaps_(y_SO)
    if projection.bias_EO is not None:
        y_SO += bins.of_slots(projection.bias_EO)
    saved = []
    for lora in projection.lora:
        A_PRI = _A_of_experts(lora, bins, projection.dtype)
        B_PRO = _B_of_experts(lora, bins, projection.dtype)
        small_SR = _times(x_SI, A_PRI, bins).mul_(lora.scaling)
        _add_product(y_SO, small_SR, B_PRO, bins)
        saved += [small_SR, B_PRO]
    return [y_SO, *saved]


def _input_grad(
    projection: Projection,
    grad_SO: torch.Tensor,
    saved: list[torch.Tensor],
    bins: ExpertBins,
    needed: bool = True,
    gaps_count: bool = True,
) -> list[torch.Tensor | None]:
    """The gradient of the projection's input, where `needed`, and scaled `grad B` (S, R) for each update.

    Gaps are left as they are where they do not count, because no sum runs over them.
    """
    grad_SI = None
    if needed:
        grad_SI, matrix = grad_SO.new_empty(len(grad_SO), projection.in_features), projection.open()
        for expert, grad_MO, grad_MI in bins.blocks(grad_SO, grad_SI):
            torch.mm(grad_MO, matrix(expert).t(), out=grad_MI)
        if gaps_count:
            bins.blank_gaps_(grad_SI)
    small_grads = []
    for lora, B_PRO in zip(projection.lora, saved[1::2], strict=True):
        small_grad_SR = _times(grad_SO, B_PRO, bins).mul_(lora.scaling)
        if needed:
            _add_product(grad_SI, small_grad_SR, _A_of_experts(lora, bins, projection.dtype), bins)
        small_grads.append(small_grad_SR)
    return [grad_SI, *small_grads]


def _factor_grads(
    projection: Projection,
    needs: list[bool],
    x_SI: torch.Tensor | None,
    grad_SO: torch.Tensor,
    saved: list[torch.Tensor],
    small_grads: list[torch.Tensor],
    bins: ExpertBins,
    weight_S1: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of each update's A and B. Rows of `grad_SO` are scaled by `weight_S1` where it is given."""

    def weighted(small_SR: torch.Tensor) -> torch.Tensor:
        return small_SR if weight_S1 is None else small_SR * weight_S1

    grads = []
    for place, lora in enumerate(projection.lora):
        grad_A = grad_B = None
        if needs[2 * place]:
            grad_PRI = _outer(weighted(small_grads[place]), x_SI, bins)
            grad_A = bins.by_expert(grad_PRI, lora.num_experts).view(lora.A.shape).to(lora.A.dtype)
        if needs[2 * place + 1]:
            grad_PRO = _outer(weighted(saved[2 * place]), grad_SO, bins)
            grad_REO = bins.by_expert(grad_PRO, lora.num_experts, r_first=True)
            # Two dimensions in 16 bits are what torch transposes fast.
            grad_B = grad_REO.view(lora.B.shape[::-1]).t().contiguous().to(lora.B.dtype)
        grads += [grad_A, grad_B]
    return grads


def _times(x_SI: torch.Tensor, factor_PRI: torch.Tensor, bins: ExpertBins) -> torch.Tensor:
    """Each slot times its expert's factor (`torch.Tensor` of shape `(S, R)`)."""
    small_SR = x_SI.new_empty(len(x_SI), factor_PRI.shape[1])
    for x_BMI, factor_BRI, small_BMR in zip(
        bins.by_bin(x_SI), bins.experts_by_bin(factor_PRI), bins.by_bin(small_SR), strict=True
    ):
        torch.bmm(x_BMI, factor_BRI.transpose(1, 2), out=small_BMR)
    return small_SR


def _add_product(y_SI: torch.Tensor, small_SR: torch.Tensor, factor_PRI: torch.Tensor, bins: ExpertBins) -> None:
    """Add to each slot what its R columns times its expert's factor give."""
    for y_BMI, small_BMR, factor_BRI in zip(
        bins.by_bin(y_SI), bins.by_bin(small_SR), bins.experts_by_bin(factor_PRI), strict=True
    ):
        y_BMI.baddbmm_(small_BMR, factor_BRI)


def _outer(small_SR: torch.Tensor, x_SI: torch.Tensor, bins: ExpertBins) -> torch.Tensor:
    """For each expert, the sum of its slots' outer products (`torch.Tensor` of shape `(P, R, I)`)."""
    y_PRI = x_SI.new_empty(len(bins.expert_P), small_SR.shape[-1], x_SI.shape[-1])
    for small_BMR, x_BMI, y_BRI in zip(
        bins.by_bin(small_SR), bins.by_bin(x_SI), bins.experts_by_bin(y_PRI), strict=True
    ):
        torch.bmm(small_BMR.transpose(1, 2), x_BMI, out=y_BRI)
    return y_PRI


def _A_of_experts(lora: LowRank, bins: ExpertBins, dtype: torch.dtype) -> torch.Tensor:
    """A of the experts in the order of their slots (`torch.Tensor` of shape `(P, R, I)`)."""
    A_ERI = lora.A_ERI.detach()
    if len(bins.expert_P) < lora.num_experts:
        return A_ERI.index_select(0, bins.expert_P).to(dtype)
    return A_ERI.to(dtype).index_select(0, bins.expert_P)


def _B_of_experts(lora: LowRank, bins: ExpertBins, dtype: torch.dtype) -> torch.Tensor:
    """B of the experts in the order of their slots, transposed (`torch.Tensor` of shape `(P, R, O)`)."""
    B_REO = transposed_B(lora, dtype)
    row_PR = bins.expert_P.unsqueeze(1) + lora.num_experts * torch.arange(lora.r, device=B_REO.device)
    return B_REO.view(-1, B_REO.shape[-1]).index_select(0, row_PR.view(-1)).view(-1, lora.r, B_REO.shape[-1])


def _gate_back(
    experts: FrozenExperts, up_SO: torch.Tensor, grad_a_SF: torch.Tensor, weight_S1: torch.Tensor, needed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gate's output, ⟨its gradient, it⟩ for each slot, and, where `needed`, the weighted gradient of its input.

    Some rows at a time: what autograd holds of the gate stays small, and in the caches.
    """
    a_SF, grad_up_SO = torch.empty_like(grad_a_SF), torch.empty_like(up_SO) if needed else None
    product_S = grad_a_SF.new_empty(len(grad_a_SF))
    for start in range(0, len(up_SO), GATE_ROWS):
        rows = slice(start, start + GATE_ROWS)
        a_SF[rows], through_gate = _rerun(experts.gate, up_SO[rows])
        product_S[rows] = (grad_a_SF[rows] * a_SF[rows]).sum(dim=-1)
        if needed:
            grad_up_SO[rows] = through_gate(grad_a_SF[rows] * weight_S1[rows])
    return a_SF, product_S, grad_up_SO


def _rerun(function: Callable, x_SI: torch.Tensor) -> tuple[torch.Tensor, Callable]:
    """`function(x)`, and what takes the gradient of that to the gradient of x."""
    with torch.enable_grad():
        leaf_SI = x_SI.detach().requires_grad_()
        y_SO = function(leaf_SI)
    return y_SO.detach(), lambda grad_SO: torch.autograd.grad(y_SO, leaf_SI, grad_SO.to(y_SO.dtype))[0]
