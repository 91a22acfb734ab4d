"""Count what routers do while forwards run, on their devices, without waiting for them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..forward import RunningForward, install_forward_hooks, running_forward
from ..moe_model import MoELayer, find_moe_layers, text_models
from ..router_output import read_router_output
from ..tiers.plan import TierPlan, TierSettings
from ..tiers.routing import check_router, install_tier_hooks, route
from .health import LayerHealth, drift_columns, layer_health, routing_columns, tier_columns


@dataclass
class _LayerMeter:
    """A layer that is measured, and the sums so far.

    Args:
        layer ([`~ordmoe_peft.moe_model.MoELayer`]): the layer.
        router (`nn.Module`): its router, with PEFT's wrapper where there is one.
        num_tiers (`int`): tiers that are measured; 0 for none.
        has_drift (`bool`): whether an adapter is on the router, and not merged into it.
        sums (`torch.Tensor`, *optional*): one per column, on the router's device.
        columns (`list[torch.Tensor]`): of the tokens that are being routed.
    """

    layer: MoELayer
    router: nn.Module
    num_tiers: int
    has_drift: bool
    sums: torch.Tensor | None = None
    columns: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_columns(self) -> int:
        return 3 + 2 * self.layer.num_experts + 2 * self.num_tiers + 2 * self.has_drift

    def add(self, columns_Tn: torch.Tensor, forward: RunningForward) -> None:
        """Add the tokens that count. Padding may be NaN, so it is masked rather than multiplied by 0."""
        forward.check_tokens(len(columns_Tn), self.layer.router_name, "Its health cannot be measured.")
        is_counted_T = counted_tokens(forward, columns_Tn.device)
        columns_Tn = columns_Tn.masked_fill(~is_counted_T.unsqueeze(1), 0)
        sums = columns_Tn.sum(0, dtype=_sum_dtype(columns_Tn.device))
        self.sums = sums if self.sums is None else self.sums + sums


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
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.num_tiers, self.grouping, self.seed, self.training_only = num_tiers, grouping, seed, training_only
        self.moe_layers = find_moe_layers(model)
        self.text_models = list(text_models(model, self.moe_layers))
        self.unsupported = _unsupported(model, self.moe_layers)
        self.meters = [
            self._layer_meter(model, layer) for layer in self.moe_layers if layer.block_name not in self.unsupported
        ]
        self._hooks = ExitStack()

    def _layer_meter(self, model: nn.Module, layer: MoELayer) -> _LayerMeter:
        router = model.get_submodule(layer.router_name)
        num_tiers = min(self.num_tiers, layer.num_experts // layer.top_k)
        return _LayerMeter(layer, router, num_tiers, isinstance(router, BaseTunerLayer) and not router.merged)

    def __enter__(self) -> "RouterMeter":
        for model in self.text_models:
            install_forward_hooks(model)
        handles = [
            *(meter.layer.router.register_forward_hook(self._reader(meter), with_kwargs=True) for meter in self.meters),
            *(meter.router.register_forward_hook(self._finisher(meter), with_kwargs=True) for meter in self.meters),
        ]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def report(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[LayerHealth]:
        """The layers that ran, from all tokens counted so far. This waits for the devices, once.

        Args:
            reduce (`Callable`, *optional*): sums a tensor over processes; by default this process is reported alone.
        """
        device = self.meters[0].layer.router.weight.device if self.meters else torch.device("cpu")
        parts = [
            torch.zeros(meter.num_columns, dtype=_sum_dtype(device), device=device)
            if meter.sums is None
            else meter.sums.to(device)
            for meter in self.meters
        ]
        sums = torch.cat(parts) if parts else torch.zeros(0)
        per_layer = iter((reduce(sums) if reduce else sums).tolist())
        layers = []
        for meter in self.meters:
            layer, own = meter.layer, [next(per_layer) for _ in range(meter.num_columns)]
            sizes = (layer.num_experts, layer.top_k, meter.num_tiers, meter.has_drift)
            layers.append(layer_health(layer.index, layer.block_name, *sizes, own))
        return [layer for layer in layers if layer is not None]

    def reset(self) -> None:
        """Forget what was counted."""
        for meter in self.meters:
            meter.sums = None

    # --------------------------------------------------------------------------------------------------------- hooks
    def _counted_forward(self) -> RunningForward | None:
        """The forward that runs, if its tokens are to be counted."""
        forward = running_forward()
        if forward is None or forward.is_recomputed or (self.training_only and not forward.is_training):
            return None
        return forward

    def _reader(self, meter: _LayerMeter) -> Callable:
        """Hook of the router itself: within PEFT's wrapper, so that the router is the adapted one in every tier."""

        @torch.no_grad()
        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if self._counted_forward() is None:
                return
            logits_TE, weights_TK, index_TK = _read(meter.layer, output)
            meter.columns = [routing_columns(logits_TE, index_TK)]
            if meter.num_tiers:
                low = [self._tier(meter, tier, args, kwargs) for tier in range(2, meter.num_tiers + 1)]
                weights, indices = [weights_TK, *(part[1] for part in low)], [index_TK, *(part[2] for part in low)]
                meter.columns.append(tier_columns(logits_TE, weights, indices))

        return read

    def _finisher(self, meter: _LayerMeter) -> Callable:
        """Hook of the outermost wrapper, after the adapter has been taken off: the router is the base's again."""

        @torch.no_grad()
        def finish(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            forward = self._counted_forward()
            if forward is None:
                return
            columns, meter.columns = meter.columns, []
            if meter.has_drift:
                logits_TE, _, index_TK = _read(meter.layer, output)
                base_logits_TE, _, base_index_TK = _read(meter.layer, route(meter.layer, None, *args, **kwargs))
                columns.append(drift_columns(logits_TE, index_TK, base_logits_TE, base_index_TK))
            meter.add(torch.cat(columns, dim=1), forward)

        return finish

    def _tier(self, meter: _LayerMeter, tier: int, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        settings = TierSettings(meter.num_tiers, self.grouping, seed=self.seed)
        plan = TierPlan(torch.tensor([tier]), settings, frozenset())
        return _read(meter.layer, route(meter.layer, plan, *args, **kwargs))


def counted_tokens(forward: RunningForward, device: torch.device) -> torch.Tensor:
    """A forward's tokens that are no padding and on tier 1 (`torch.Tensor` of shape `(T,)`, bool), once per device."""

    def counted() -> torch.Tensor:
        plan = forward.plan
        if plan is not None and plan.draw.positions is not None:  # rows that share prompts; they have a 4-D mask
            counted_T = plan.draw.positions.reshape(-1).to(device) >= 0
        else:
            counted_T = _is_real(forward, device)
        return counted_T if plan is None else counted_T & (forward.tier_of_token(device) == 1)

    return forward.once_here(("counted", device), counted)


def _is_real(forward: RunningForward, device: torch.device) -> torch.Tensor:
    mask, (rows, length) = forward.attention_mask, forward.shape
    if mask is None:
        return torch.ones(rows * length, dtype=torch.bool, device=device)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        # The mask of a cached step covers the whole sequence, the step its end.
        return mask[:, -length:].reshape(-1).to(device).bool()
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    raise OrdMoERuntimeError(
        f"Router statistics leave padding out by an attention_mask of shape (batch, sequence), got {shape}. Run "
        "without them, or with such a mask."
    )


def _unsupported(model: nn.Module, layers: list[MoELayer]) -> dict[str, str]:
    """Layers whose routers cannot be held to tiers, and why. Where there is none, the model has its tier hooks on."""
    try:
        install_tier_hooks(model)
    except OrdMoEModelError:
        return {layer.block_name: reason for layer in layers if (reason := _refusal(layer)) is not None}
    return {}


def _refusal(layer: MoELayer) -> str | None:
    try:
        check_router(layer)
    except OrdMoEModelError as error:
        return str(error)
    return None


def _read(layer: MoELayer, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (T, E), weights (T, K) and experts (T, K) out of what a router returns."""
    found = read_router_output(layer, output)
    if any(part is None for part in found):
        shapes = [tuple(part.shape) for part in output] if isinstance(output, tuple) else type(output).__name__
        raise OrdMoEModelError(
            f"{layer.router_name} ({type(layer.router).__name__}) does not return (logits, weights, experts), but "
            f"{shapes}; its health cannot be measured."
        )
    return found


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
