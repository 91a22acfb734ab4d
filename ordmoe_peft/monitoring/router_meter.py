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
from ..moe_layers import MoELayer, find_moe_layers, text_model
from ..tiers.plan import TierPlan
from ..tiers.routing import TierForward, check_router, install_tier_hooks, route, running_tiers
from .health import LayerHealth, drift_columns, layer_health, routing_columns, tier_columns


@dataclass
class _LayerMeter:
    """A layer that is measured, and the sums so far.

    Args:
        layer ([`~ordmoe_peft.moe_layers.MoELayer`]): the layer.
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

    def add(self, columns_Tn: torch.Tensor, forward: "_LiveForward") -> None:
        """Add the tokens that count. What padding computed may be no number, so it is replaced, not weighted."""
        is_counted_T = forward.counted(len(columns_Tn), columns_Tn.device)
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
        self.text_model = text_model(model, self.moe_layers)
        self.unsupported = _unsupported(model, self.moe_layers)
        self.meters = [
            self._layer_meter(model, layer) for layer in self.moe_layers if layer.block_name not in self.unsupported
        ]
        self._forward: _LiveForward | None = None
        self._hooks = ExitStack()

    def _layer_meter(self, model: nn.Module, layer: MoELayer) -> _LayerMeter:
        router = model.get_submodule(layer.router_name)
        num_tiers = min(self.num_tiers, layer.num_experts // layer.top_k)
        return _LayerMeter(layer, router, num_tiers, isinstance(router, BaseTunerLayer) and not router.merged)

    def __enter__(self) -> "RouterMeter":
        handles = [
            self.text_model.register_forward_pre_hook(self._open, with_kwargs=True),
            self.text_model.register_forward_hook(self._close, always_call=True),
            *(meter.layer.router.register_forward_hook(self._reader(meter), with_kwargs=True) for meter in self.meters),
            *(meter.router.register_forward_hook(self._finisher(meter), with_kwargs=True) for meter in self.meters),
        ]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()
        self._forward = None

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
    def _open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._forward = None  # an interrupted forward leaves its own: its closing hook does not run
        if self.training_only and not (module.training and torch.is_grad_enabled()):
            return
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._forward = _LiveForward(inputs.shape[1], mask)

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._forward = None

    def _reader(self, meter: _LayerMeter) -> Callable:
        """Hook of the router itself: within PEFT's wrapper, so that the router is the adapted one in every tier."""

        @torch.no_grad()
        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if self._forward is None:
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
            if self._forward is None:
                return
            columns, meter.columns = meter.columns, []
            if meter.has_drift:
                logits_TE, _, index_TK = output
                base_logits_TE, _, base_index_TK = route(meter.layer, None, *args, **kwargs)
                columns.append(drift_columns(logits_TE, index_TK, base_logits_TE, base_index_TK))
            meter.add(torch.cat(columns, dim=1), self._forward)

        return finish

    def _tier(self, meter: _LayerMeter, tier: int, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        plan = TierPlan(torch.tensor([tier]), meter.num_tiers, self.grouping, frozenset(), self.seed, step=0)
        forward = TierForward(plan, self._forward.sequence_length, past_length=0)
        return _read(meter.layer, route(meter.layer, forward, *args, **kwargs))


@dataclass
class _LiveForward:
    """What a running forward of the text model says of its tokens, and which count, once per device."""

    sequence_length: int
    attention_mask: Any
    counted_by_device: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def counted(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """The tokens that are no padding and on tier 1 (`torch.Tensor` of shape `(T,)`, bool)."""
        if device not in self.counted_by_device:
            tiers = running_tiers()
            if tiers is not None and tiers.plan.places is not None:  # rows that share prompts; they have a 4-D mask
                counted_T = tiers.plan.places.reshape(-1).to(device) >= 0
            else:
                counted_T = self._is_real(num_tokens, device)
            if tiers is not None:
                tier_T = tiers.tier_of_token(num_tokens, device)
                counted_T = counted_T & (tier_T == 1)
            self.counted_by_device[device] = counted_T
        return self.counted_by_device[device]

    def _is_real(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        mask = self.attention_mask
        if mask is None:
            return torch.ones(num_tokens, dtype=torch.bool, device=device)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            # The mask of a cached step covers the whole sequence, the step its end.
            return mask[:, -self.sequence_length :].reshape(-1).to(device).bool()
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
    shapes = [tuple(part.shape) for part in output] if isinstance(output, tuple) else []
    if len(shapes) != 3 or shapes[0][1:] != (layer.num_experts,) or shapes[1] != shapes[2]:
        raise OrdMoEModelError(
            f"{layer.router_name} ({type(layer.router).__name__}) does not return (logits, weights, experts), but "
            f"{shapes or type(output).__name__}; its health cannot be measured."
        )
    return output


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
