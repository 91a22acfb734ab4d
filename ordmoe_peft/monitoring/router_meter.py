"""Count what routers do while forwards run, on their devices, without waiting for them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..forward import RunningForward, install_forward_hooks, running_forward
from ..moe_model import MoELayer, MoEModel
from ..tiers.plan import TierPlan, TierSettings
from ..tiers.router_check import check_router
from ..tiers.routing import install_tier_hooks, route, router_sizes
from .health import LayerHealth, column_widths, drift_columns, layer_health, routing_columns, tier_columns
from .recording import Call, record


@dataclass
class _LayerMeter:
    """What is counted of a layer.

    Args:
        layer ([`~ordmoe_peft.moe_model.MoELayer`]): the layer.
        num_tiers (`int`): tiers that are measured; 0 for none.
        has_drift (`bool`): whether an adapter is on the router, and not merged into it.
        columns (`dict[str, torch.Tensor]`): of the tokens that are being routed.
        sums (`torch.Tensor` of shape `(n,)`, *optional*): of all columns, over all tokens, on the router's device.
    """

    layer: MoELayer
    num_tiers: int
    has_drift: bool
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: torch.Tensor | None = None

    @property
    def widths(self) -> dict[str, int]:
        return column_widths(self.layer.num_experts, self.num_tiers, self.has_drift)


class RouterMeter:
    """Within its `with` block, counts what each router does with the tokens of `model`'s forwards.

    Counted are tokens that are not padding, of rows on tier 1, in a live forward: what gradient checkpointing runs
    again in backward is not counted a second time. Drift compares the adapted router with the same router without its
    adapter on the same hidden states, those of the adapted model: so it is the router's own change, layer by layer,
    apart from what layers below feed it. The sums stay on the routers' devices until `report` fetches them at once.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        num_tiers (`int`, defaults to 0): C of the tiers whose gate mass is measured, at the cost of C − 1 further runs
            of each router; in a layer that is too small, the largest that fits. 0 measures none.
        grouping (`str`, defaults to `"uniform"`), seed (`int`, defaults to 0): how tiers are cut.
        training_only (`bool`, defaults to `False`): count only forwards in training mode with gradients, so neither
            evaluation nor generation.

    Attributes:
        unsupported (`dict[str, str]`): layer name → why tiers cannot be imposed on its router; not measured.
        unread (`dict[str, str]`): layer name → why its router, which tiers can be imposed on, cannot be read; likewise.

    Raises:
        [`OrdMoEModelError`]: the model has no MoE layers, or a router's output is not (logits, weights, experts).
        [`OrdMoERuntimeError`]: an attention mask does not say which tokens are padding.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_tiers: int = 0,
        grouping: str = "uniform",
        seed: int = 0,
        training_only: bool = False,
    ):
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.num_tiers, self.grouping, self.seed, self.training_only = num_tiers, grouping, seed, training_only
        self.moe_layers = MoEModel.of(self.model).layers
        self.unsupported, self.unread = _not_measured(self.model, self.moe_layers)
        # By the layer's index.
        self.meters = {
            layer.index: self._layer_meter(layer)
            for layer in self.moe_layers
            if layer.block_name not in self.unsupported | self.unread
        }
        self._listening = ExitStack()

    def _layer_meter(self, layer: MoELayer) -> _LayerMeter:
        wrapped = self.model.get_submodule(layer.router_name)
        num_tiers = min(self.num_tiers, layer.num_experts // layer.top_k) if router_sizes(layer).is_ranked else 0
        adapters = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
        return _LayerMeter(layer, num_tiers, any(not adapter.merged for adapter in adapters))

    def __enter__(self) -> "RouterMeter":
        for model in MoEModel.of(self.model).text_models:
            install_forward_hooks(model)
        layers = [meter.layer for meter in self.meters.values()]
        listening = record(self.model, router=self._count, wrapped_router=self._finish, layers=layers)
        self._listening.enter_context(listening)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._listening.close()

    def report(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[LayerHealth]:
        """The layers that ran, from all tokens counted so far. This waits for the devices, once.

        Args:
            reduce (`Callable`, *optional*): sums a tensor over processes; by default this process is reported alone.
        """
        meters = list(self.meters.values())
        if not meters:
            return []
        device = meters[0].layer.router_weight.device
        nothing = torch.zeros(0, dtype=_sum_dtype(device), device=device)
        parts = [nothing.new_zeros(sum(m.widths.values())) if m.sums is None else m.sums.to(nothing) for m in meters]
        sums_n = torch.cat(parts)
        sums_n = (sums_n if reduce is None else reduce(sums_n)).cpu()
        columns = iter(sums_n.split([width for meter in meters for width in meter.widths.values()]))
        layers = []
        for meter in meters:
            layer, sums = meter.layer, {name: next(columns).tolist() for name in meter.widths}
            layers.append(layer_health(layer.index, layer.block_name, layer.num_experts, layer.top_k, sums))
        return [layer for layer in layers if layer is not None]

    def reset(self) -> None:
        """Forget what was counted."""
        for meter in self.meters.values():
            meter.sums = None

    def _counted_forward(self) -> RunningForward | None:
        """The forward that runs, if its tokens are to be counted."""
        forward = running_forward()
        if forward is None or forward.is_recomputed or (self.training_only and not forward.is_training):
            return None
        return forward

    @torch.no_grad()
    def _count(self, call: Call) -> None:
        if self._counted_forward() is None:
            return
        meter = self.meters[call.layer.index]
        logits_TE, weights_TK, index_TK = _read(call)
        meter.columns = routing_columns(logits_TE, index_TK)
        if meter.num_tiers:
            settings = TierSettings(meter.num_tiers, self.grouping, seed=self.seed)
            plans = [TierPlan(torch.tensor([tier]), settings, frozenset()) for tier in range(2, meter.num_tiers + 1)]
            low = [_read_again(call, plan) for plan in plans]
            weights, indices = [weights_TK, *(part[1] for part in low)], [index_TK, *(part[2] for part in low)]
            meter.columns |= tier_columns(logits_TE, weights, indices)

    @torch.no_grad()
    def _finish(self, call: Call) -> None:
        forward, meter = self._counted_forward(), self.meters[call.layer.index]
        if forward is None:
            return
        columns, meter.columns = meter.columns, {}
        if meter.has_drift:
            logits_TE, _, index_TK = _read(call)
            base_logits_TE, _, base_index_TK = _read_again(call, None)
            columns |= drift_columns(logits_TE, index_TK, base_logits_TE, base_index_TK)
        columns_Tn = torch.cat([columns[name] for name in meter.widths], dim=1)
        tokens = forward.tokens_of(call.layer.router_name, columns_Tn, "Its health cannot be measured.")
        # Padding may be NaN, so it is masked rather than multiplied by 0.
        columns_Tn = columns_Tn.masked_fill(~counted_tokens(forward, columns_Tn.device)[tokens].unsqueeze(1), 0)
        sums_n = columns_Tn.sum(0, dtype=_sum_dtype(columns_Tn.device))
        meter.sums = sums_n if meter.sums is None else meter.sums + sums_n


def _read(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (T, E), weights (T, K) and experts (T, K) out of what a router returned."""
    logits_TE, weights_TK, index_TK = call.routing
    if logits_TE is None or weights_TK is None or index_TK is None:
        output = call.output
        shapes = [tuple(part.shape) for part in output] if isinstance(output, tuple) else type(output).__name__
        raise OrdMoEModelError(
            f"{call.layer.router_name} ({type(call.layer.router).__name__}) does not return (logits, weights, "
            f"experts), but {shapes}; its health cannot be measured."
        )
    return logits_TE, weights_TK, index_TK


def _read_again(call: Call, plan: TierPlan | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of what the router gives for the same tokens when held to a plan."""
    output = route(call.layer, plan, *call.args, with_lora=plan is not None, **call.kwargs)
    return _read(replace(call, output=output))


def counted_tokens(forward: RunningForward, device: torch.device) -> torch.Tensor:
    """A forward's tokens that are no padding and on tier 1 (`torch.Tensor` of shape `(T,)`, bool), once per device."""

    def counted() -> torch.Tensor:
        plan, mask, (rows, length) = forward.plan, forward.attention_mask, forward.shape
        if plan is not None and plan.draw.positions is not None:  # rows that share prompts; they have a 4-D mask
            counted_T = plan.draw.positions.reshape(-1).to(device) >= 0
        elif mask is None:
            counted_T = torch.ones(rows * length, dtype=torch.bool, device=device)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            # The mask of a cached step covers the whole sequence, the step its end.
            counted_T = mask[:, -length:].reshape(-1).to(device).bool()
        else:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise OrdMoERuntimeError(
                f"Router statistics leave padding out by an attention_mask of shape (batch, sequence), got {shape}. "
                "Run without them, or with such a mask."
            )
        return counted_T if plan is None else counted_T & (forward.tier_of_token(device) == 1)

    return forward.once_here(("counted", device), counted)


def _not_measured(model: nn.Module, layers: list[MoELayer]) -> tuple[dict[str, str], dict[str, str]]:
    """Layers whose routers cannot be held to tiers, and those that cannot be read, and why. The others have their tier
    hooks on."""
    unsupported, unread = {}, {}
    for layer in layers:
        try:
            if not check_router(layer).is_readable:
                named = f"{layer.router_name} ({type(layer.router).__name__})"
                unread[layer.block_name] = f"{named} does not return (logits, weights, experts)"
        except OrdMoEModelError as error:
            unsupported[layer.block_name] = str(error)
    install_tier_hooks(model, [layer.index for layer in layers if layer.block_name not in unsupported | unread])
    return unsupported, unread


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
