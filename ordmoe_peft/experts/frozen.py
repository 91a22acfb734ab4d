"""Frozen experts with low-rank updates as one differentiable function: what to compute forward, what to keep, and how
to come back.

Where the host knows which expert has which rows (always on CPU, and for packed weights, which are unpacked expert by
expert), a base product is one `torch.mm` per expert that has rows, on a block of contiguous rows, as `grouped_mm` does
on CPU. The products with LoRA's factors are too small for that: they are batched over a bin of experts
(`ops/dispatch.py`). Work goes through part after part of the experts, so that little exists beside what is kept.

Kept for backward are the tokens, the up-projection's output, and products with R columns. Frozen weights are kept by
reference, and packed ones are unpacked again. The gate is run again. Nothing of width H per routed row is kept: the
gradient of a routing weight is taken before the down-projection, as ⟨g, a W⟩ = ⟨g Wᵀ, a⟩.

Shape suffixes as in `experts/__init__.py`; S slots, M slots of a part or of an expert of a bin, P experts in the order
of their slots, B experts of a bin (`ExpertSlots`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .layout import ExpertSlots, Part


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


def transposed_B(lora: LowRank, dtype: torch.dtype) -> torch.Tensor:
    """`B` with columns as rows (`torch.Tensor` of shape `(R, E, O)`), which products can read as it is."""
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
    x_TH: torch.Tensor, weights_TK: torch.Tensor, experts: FrozenExperts, slots: ExpertSlots
) -> torch.Tensor:
    """Each token through its experts, summed by routing weight.

    Differentiable once, in `x_TH`, `weights_TK` and the factors of `experts`.

    Args:
        x_TH (`torch.Tensor` of shape `(T, H)`): tokens.
        weights_TK (`torch.Tensor` of shape `(T, K)`): routing weights.
        experts ([`FrozenExperts`]): what to run.
        slots ([`ExpertSlots`]): which rows go to which expert.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `x_TH`.
    """
    factors = [factor for lora in (*experts.up.lora, *experts.down.lora) for factor in (lora.A, lora.B)]
    return _FrozenExperts.apply(experts, slots, x_TH, weights_TK, *factors)


def weighted_sum_(y_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The sum of each token's rows by routing weight (`torch.Tensor` of shape `(T, H)`). Writes into `y_TKH`.

    As transformers does it, rounding included: an adapter that is 0 changes no bit.
    """
    in_place = torch.result_type(y_TKH, weights_TK) == y_TKH.dtype
    return (y_TKH.mul_ if in_place else y_TKH.mul)(weights_TK.unsqueeze(-1)).sum(dim=1)


class _FrozenExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, experts, slots, x_TH, weights_TK, *factors):
        num_slots = len(slots.token_S)
        # Autocast knows some of these operators and not others: all are in the weights' dtype, as grouped_mm is.
        with torch.autocast(x_TH.device.type, enabled=False):
            x_in_dtype_TH = x_TH.to(experts.up.dtype)
            up, down = (_Run(projection, slots) for projection in (experts.up, experts.down))
            up_SO = x_in_dtype_TH.new_empty(num_slots, experts.up.out_features)
            down_SH = x_in_dtype_TH.new_empty(num_slots, experts.down.out_features, dtype=experts.down.dtype)
            for part in slots.parts:
                up_MO = up.forward(part, slots.rows(part, x_in_dtype_TH), up_SO[part.slots])
                a_MF = experts.gate(up_MO).to(experts.down.dtype)
                down.forward(part, a_MF, down_SH[part.slots], gaps_count=experts.norm is not None)
            y_SH = down_SH if experts.norm is None else experts.norm(down_SH)
            y_TH = weighted_sum_(slots.by_token(y_SH), weights_TK).to(x_TH.dtype)
        ctx.experts, ctx.slots = experts, slots
        kept_SH = None if experts.norm is None else down_SH
        ctx.save_for_backward(x_TH, weights_TK, up_SO, kept_SH, *up.saved, *down.saved, *factors)
        return y_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        experts, slots = ctx.experts, ctx.slots
        x_TH, weights_TK, up_SO, down_SH, *saved = ctx.saved_tensors
        num_up, num_down = 2 * len(experts.up.lora), 2 * len(experts.down.lora)
        _, _, needs_x, needs_weights, *needs = ctx.needs_input_grad
        with torch.autocast(x_TH.device.type, enabled=False):
            up = _Run(experts.up, slots, saved[:num_up], needs[:num_up])
            down = _Run(experts.down, slots, saved[num_up : num_up + num_down], needs[num_up:])
            grad_x_TH, grad_weights_TK = _back_through_parts(
                up, down, experts, x_TH, weights_TK, grad_TH, up_SO, down_SH, needs_x
            )
            grads = *up.take_factor_grads(), *down.take_factor_grads()
        return None, None, grad_x_TH, grad_weights_TK if needs_weights else None, *grads


def _back_through_parts(
    up: "_Run",
    down: "_Run",
    experts: FrozenExperts,
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    grad_TH: torch.Tensor,
    up_SO: torch.Tensor,
    down_SH: torch.Tensor | None,
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of the tokens, where they are needed, and of the routing weights. `up` and `down` note those of
    their factors."""
    slots = up.slots
    x_in_dtype_TH, grad_TH = x_TH.to(experts.up.dtype), grad_TH.to(experts.down.dtype)
    weight_S = weights_TK.new_zeros(len(slots.token_S)).index_copy_(0, slots.slot_N, weights_TK.reshape(-1))
    weight_S1 = weight_S.to(grad_TH.dtype).unsqueeze(1)  # 0 in gaps, so that these count for nothing
    grad_weight_S = torch.empty_like(weight_S1).squeeze(1)
    grad_x_SH = x_in_dtype_TH.new_empty(len(slots.token_S), x_TH.shape[-1]) if needs_x else None
    for part in slots.parts:
        grad_MH, weight_M1 = slots.rows(part, grad_TH), weight_S1[part.slots]
        if experts.norm is not None:
            y_MH, through_norm = _rerun(experts.norm, down_SH[part.slots])
            grad_weight_S[part.slots] = (grad_MH * y_MH).sum(dim=-1)
            grad_MH, weight_M1 = through_norm(grad_MH * weight_M1), torch.ones_like(weight_M1)
        grad_a_MF, *small_grads = down.input_grad(part, grad_MH)
        a_MF, through_gate = _rerun(experts.gate, up_SO[part.slots])
        if experts.norm is None:
            grad_weight_S[part.slots] = (grad_a_MF * a_MF).sum(dim=-1)
            if experts.down.bias_EO is not None:
                for expert, grad_H, weight_M in part.blocks(grad_MH, grad_weight_S[part.slots]):
                    weight_M += grad_H @ experts.down.bias_EO[expert]
        down.add_factor_grads(part, a_MF, grad_MH, small_grads, weight_M1)
        if not needs_x and not any(up.needs):
            continue
        del grad_MH
        grad_up_MO = through_gate(grad_a_MF.mul_(weight_M1))
        grad_x_MH = grad_x_SH[part.slots] if needs_x else None
        _, *small_grads = up.input_grad(part, grad_up_MO, grad_x_MH, needed=needs_x, gaps_count=False)
        if any(up.needs):
            up.add_factor_grads(part, slots.rows(part, x_in_dtype_TH), grad_up_MO, small_grads)
    grad_x_TH = slots.sum_by_token(grad_x_SH).to(x_TH.dtype) if needs_x else None
    return grad_x_TH, slots.by_token(grad_weight_S.unsqueeze(1)).squeeze(-1).to(weights_TK.dtype)


class _Run:
    """A projection on its way through the slots, forward or backward.

    Args:
        projection ([`Projection`]): what to run.
        slots ([`ExpertSlots`]): through what.
        saved (`list` of `torch.Tensor`, *optional*): what the forward kept: for each update scaled `x Aᵀ` (S, R), and
            `B` (P, R, O).
        needs (`Sequence` of `bool`, defaults to none): whether gradients of each update's A and B are asked for.
    """

    def __init__(
        self,
        projection: Projection,
        slots: ExpertSlots,
        saved: list[torch.Tensor] | None = None,
        needs: Sequence[bool] = (),
    ):
        self.projection, self.slots, self.needs = projection, slots, list(needs)
        self.matrix, dtype = projection.open(), projection.dtype
        self.A_PRI = [_A_of_experts(lora, slots, dtype) for lora in projection.lora]
        if saved is None:
            small_SR = [A_PRI.new_empty(len(slots.token_S), A_PRI.shape[1]) for A_PRI in self.A_PRI]
            B_PRO = [_B_of_experts(lora, slots, dtype) for lora in projection.lora]
            saved = [tensor for pair in zip(small_SR, B_PRO, strict=True) for tensor in pair]
        self.saved, self.small_SR, self.B_PRO = saved, saved[::2], saved[1::2]
        factors = [factor for pair in zip(self.A_PRI, self.B_PRO, strict=True) for factor in pair]
        self.grads = [
            slots.empty_for(projection.lora[place // 2].num_experts, factors[place]) if needed else None
            for place, needed in enumerate(self.needs)
        ]

    def forward(self, part: Part, x_MI: torch.Tensor, y_MO: torch.Tensor, gaps_count: bool = True) -> torch.Tensor:
        """Write the output of a part's slots into `y_MO`."""
        bias_EO = self.projection.bias_EO
        for expert, x_I, y_O in part.blocks(x_MI, y_MO):
            torch.mm(x_I, self.matrix(expert), out=y_O)
            if bias_EO is not None:
                y_O += bias_EO[expert]
        if gaps_count:  # what memory held there may be no number, which times 0 is none either
            part.blank_gaps_(y_MO)
        for lora, A_PRI, small_SR, B_PRO in zip(
            self.projection.lora, self.A_PRI, self.small_SR, self.B_PRO, strict=True
        ):
            small_MR = _times(part, x_MI, A_PRI, lora.scaling, out=small_SR[part.slots])
            _add_product(part, y_MO, small_MR, B_PRO)
        return y_MO

    def input_grad(
        self,
        part: Part,
        grad_MO: torch.Tensor,
        grad_MI: torch.Tensor | None = None,
        needed: bool = True,
        gaps_count: bool = True,
    ) -> list[torch.Tensor | None]:
        """The gradient of the input in a part's slots, where `needed`, and scaled `grad B` (M, R) of each update.

        Gaps are left as they are where they do not count, because no sum runs over them.
        """
        if needed:
            if grad_MI is None:
                grad_MI = grad_MO.new_empty(len(grad_MO), self.projection.in_features)
            for expert, grad_O, grad_I in part.blocks(grad_MO, grad_MI):
                torch.mm(grad_O, self.matrix(expert).t(), out=grad_I)
            if gaps_count:
                part.blank_gaps_(grad_MI)
        small_grads = []
        for lora, A_PRI, B_PRO in zip(self.projection.lora, self.A_PRI, self.B_PRO, strict=True):
            small_grads.append(_times(part, grad_MO, B_PRO, lora.scaling))
            if needed:
                _add_product(part, grad_MI, small_grads[-1], A_PRI)
        return [grad_MI, *small_grads]

    def add_factor_grads(
        self,
        part: Part,
        x_MI: torch.Tensor,
        grad_MO: torch.Tensor,
        small_grads: list[torch.Tensor],
        weight_M1: torch.Tensor | None = None,
    ) -> None:
        """Note the gradients of a part's factors. `grad_MO` is yet to be scaled by `weight_M1`, if given."""

        def weighted(small_MR: torch.Tensor) -> torch.Tensor:
            return small_MR if weight_M1 is None else small_MR * weight_M1

        for small_grad_MR, small_SR, grad_A_PRI, grad_B_PRO in zip(
            small_grads, self.small_SR, self.grads[::2], self.grads[1::2], strict=True
        ):
            if grad_A_PRI is not None:
                _outer(part, weighted(small_grad_MR), x_MI, out=grad_A_PRI)
            if grad_B_PRO is not None:
                _outer(part, weighted(small_SR[part.slots]), grad_MO, out=grad_B_PRO)

    def take_factor_grads(self) -> list[torch.Tensor | None]:
        """Gradients of each update's A and B, as they are stored. What they are made of is let go of one by one."""
        self.A_PRI.clear()
        grads = []
        for lora in self.projection.lora:
            grad_A_PRI, grad_B_PRO = self.grads.pop(0), self.grads.pop(0)
            grad_A = grad_B = None
            if grad_A_PRI is not None:
                grad_A_ERI, grad_A_PRI = self.slots.by_expert(grad_A_PRI, lora.num_experts), None
                grad_A = grad_A_ERI.view(lora.A.shape).to(lora.A.dtype)
                del grad_A_ERI
            if grad_B_PRO is not None:
                grad_B_REO, grad_B_PRO = self.slots.by_expert(grad_B_PRO, lora.num_experts, r_first=True), None
                # Two dimensions in 16 bits are what torch transposes fast.
                grad_B_OX = grad_B_REO.view(lora.B.shape[::-1]).t().contiguous()
                del grad_B_REO
                grad_B = grad_B_OX.to(lora.B.dtype)
            grads += [grad_A, grad_B]
        return grads


def _times(
    part: Part, x_MI: torch.Tensor, factor_PRI: torch.Tensor, scaling: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each slot times its expert's factor, scaled (`torch.Tensor` of shape `(M, R)`)."""
    small_MR = x_MI.new_empty(len(x_MI), factor_PRI.shape[1]) if out is None else out
    bins = zip(part.by_bin(x_MI), part.factors_by_bin(factor_PRI), part.by_bin(small_MR), strict=True)
    for x_BMI, factor_BRI, small_BMR in bins:
        torch.bmm(x_BMI, factor_BRI.transpose(1, 2), out=small_BMR)
    return small_MR.mul_(scaling)


def _add_product(part: Part, y_MI: torch.Tensor, small_MR: torch.Tensor, factor_PRI: torch.Tensor) -> None:
    """Add to each slot what its R columns times its expert's factor give."""
    bins = zip(part.by_bin(y_MI), part.by_bin(small_MR), part.factors_by_bin(factor_PRI), strict=True)
    for y_BMI, small_BMR, factor_BRI in bins:
        y_BMI.baddbmm_(small_BMR, factor_BRI)


def _outer(part: Part, small_MR: torch.Tensor, x_MI: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of each expert's outer products into its place in `out` (`torch.Tensor` of shape `(P, R, I)`)."""
    bins = zip(part.by_bin(small_MR), part.by_bin(x_MI), part.factors_by_bin(out), strict=True)
    for small_BMR, x_BMI, out_BRI in bins:
        torch.bmm(small_BMR.transpose(1, 2), x_BMI, out=out_BRI)


def _A_of_experts(lora: LowRank, slots: ExpertSlots, dtype: torch.dtype) -> torch.Tensor:
    """A of the experts in the order of their slots (`torch.Tensor` of shape `(P, R, I)`)."""
    A_ERI = lora.A_ERI.detach()
    if len(slots.expert_P) < lora.num_experts:
        return A_ERI.index_select(0, slots.expert_P).to(dtype)
    return A_ERI.to(dtype).index_select(0, slots.expert_P)


def _B_of_experts(lora: LowRank, slots: ExpertSlots, dtype: torch.dtype) -> torch.Tensor:
    """B of the experts in the order of their slots, transposed (`torch.Tensor` of shape `(P, R, O)`)."""
    B_REO = transposed_B(lora, dtype)
    row_PR = slots.expert_P.unsqueeze(1) + lora.num_experts * torch.arange(lora.r, device=B_REO.device)
    return B_REO.view(-1, B_REO.shape[-1]).index_select(0, row_PR.view(-1)).view(-1, lora.r, B_REO.shape[-1])


def _rerun(function: Callable, x_SI: torch.Tensor) -> tuple[torch.Tensor, Callable]:
    """`function(x)`, and what takes the gradient of that to the gradient of x."""
    with torch.enable_grad():
        leaf_SI = x_SI.detach().requires_grad_()
        y_SO = function(leaf_SI)
    return y_SO.detach(), lambda grad_SO: torch.autograd.grad(y_SO, leaf_SI, grad_SO.to(y_SO.dtype))[0]
