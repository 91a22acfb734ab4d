"""Hold forward passes to tiers: `with tier_routing(model, tier=3): model(**inputs)`.

The router's own code stays the judge. While a router runs, its `torch.topk` over the E scores is answered with the
experts of the tier in place of the first K; what the router makes of the chosen scores is its business. Hooks on the
text model and on its routers do this; without an active tier they return at once.

A forward's tier outlives its `with` block in one case: gradient checkpointing runs layers again in backward. The
checkpoint function of each layer is therefore wrapped to carry the tier along.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .._compat import wrap_checkpointing
from ..config import OrdMoEConfig
from ..errors import OrdMoEModelError, OrdMoERuntimeError
from ..moe_layers import WEIGHTS, MoELayer, find_moe_layers, router_weights, text_model
from ..unserved_blocks import check_scope_is_served
from .plan import TierPlan, make_plan
from .ranking import first_rank, random_order, rank_experts, ranks_of_tiers


# Plans asked for by the `with` blocks of this thread: id of the text model → plan.
_requested: ContextVar[dict[int, TierPlan]] = ContextVar("requested_tiers", default={})  # noqa: B039 (never mutated)


@dataclass(frozen=True)
class TierForward:
    """A plan and what one forward of the text model says of its tokens."""

    plan: TierPlan
    sequence_length: int
    past_length: int
    _own: dict[tuple, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def _made(self) -> dict[tuple, torch.Tensor]:
        """What was made for the layers before: of all forwards, where it does not depend on the length of a cache."""
        return self.plan.made if self.plan.tiers.dim() == 1 else self._own

    def tier_of_token(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """The tier of each token (`torch.Tensor` of shape `(T,)`), brought to a device once, not by each layer."""
        key = ("tiers", num_tokens, device, self.sequence_length)
        if key not in self._made:
            lengths = (self.sequence_length, self.past_length)
            self._made[key] = self.plan.tier_of_token(num_tokens, device, *lengths)
        return self._made[key]

    def choice(self, ranked_TE: torch.Tensor, top_k_index_TK: torch.Tensor) -> torch.Tensor:
        """The experts of each token's tier (`torch.Tensor` of shape `(T, K)`), on tier 1 as the router gave them.

        Args:
            ranked_TE (`torch.Tensor` of shape `(T, E)`): experts in the order of their ranks.
            top_k_index_TK (`torch.Tensor` of shape `(T, K)`): the router's choice.
        """
        (num_tokens, num_ranked), top_k, plan = ranked_TE.shape, top_k_index_TK.shape[1], self.plan
        if plan.only_tier is not None:
            start = first_rank(plan.only_tier, plan.num_tiers, num_ranked, top_k, plan.grouping) - 1
            return top_k_index_TK if plan.only_tier == 1 else ranked_TE[:, start : start + top_k]
        tier_T = self.tier_of_token(num_tokens, ranked_TE.device)
        key = ("ranks", num_tokens, ranked_TE.device, self.sequence_length, num_ranked, top_k)
        if key not in self._made:
            self._made[key] = ranks_of_tiers(tier_T, plan.num_tiers, num_ranked, top_k, plan.grouping)
        return torch.where((tier_T == 1).unsqueeze(1), top_k_index_TK, ranked_TE.gather(1, self._made[key]))


class _Running(threading.local):
    """The forward that runs in this thread, and the selection mode of the router that runs in it."""

    forward: TierForward | None = None
    selection: "_TierSelection | None" = None


_running = _Running()


@contextmanager
def tier_routing(
    model: nn.Module,
    tier: int | Sequence[int] | torch.Tensor,
    *,
    num_tiers: int | None = None,
    grouping: str | None = None,
    layer_scope: str | Sequence[int] | None = None,
    seed: int | None = None,
    step: int = 0,
    num_samples: int | None = None,
    tier_weights: str | None = None,
    places: torch.Tensor | None = None,
    first_sample: int = 0,
) -> Iterator[None]:
    """Within the block, every forward and `generate` of `model` activates the experts of `tier` alone.

    Settings that are not given come from the active OrdMoE adapter, or are [`OrdMoEConfig`]'s defaults on a model
    without one. Blocks nest; the inner one holds. Other threads and other models are not affected.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        tier (`int`, sequence of `int`, or `torch.Tensor` of shape `(B,)` or `(B, S)`): the tier of all rows, of each
            row, or of each position; tier 1 is the model as it is.
        num_tiers (`int`, *optional*): C.
        grouping (`str`, *optional*): `"uniform"`, `"high_only"` or `"random"`.
        layer_scope (`str` or list of `int`, *optional*): `"all"`, `"shallow"`, `"deep"`, or indices of MoE layers.
        seed (`int`, *optional*), step (`int`, defaults to 0): what `random` grouping draws from.
        num_samples (`int`, *optional*), first_sample (`int`, defaults to 0): see
            [`~ordmoe_peft.tiers.plan.TierPlan`].
        tier_weights (`str`, *optional*): `"router"` or `"match"`.
        places (`torch.Tensor` of shape `(B, S)`, *optional*): see [`~ordmoe_peft.tiers.plan.TierPlan`].

    Raises:
        [`OrdMoEConfigError`]: the request does not fit the model, e.g. C·K > E.
        [`OrdMoEModelError`]: the model has no MoE layers, or such that tiers cannot be imposed on.
    """
    layers = install_tier_hooks(model)
    config = adapter_config(model)
    scope = config.layer_scope if layer_scope is None else layer_scope
    check_scope_is_served(model, scope)
    plan = make_plan(
        layers,
        tier,
        num_tiers=config.num_tiers if num_tiers is None else num_tiers,
        grouping=config.grouping if grouping is None else grouping,
        layer_scope=scope,
        seed=config.tier_seed if seed is None else seed,
        step=step,
        num_samples=num_samples,
        tier_weights=config.tier_weights if tier_weights is None else tier_weights,
        first_sample=first_sample,
        places=places,
    )
    if plan.tier_weights == "match" != config.tier_weights:  # else it was checked with the adapter
        for index in sorted(plan.layers):
            check_weights(layers[index])
    token = _requested.set({**_requested.get(), id(text_model(model, layers)): plan})
    try:
        yield
    finally:
        _requested.reset(token)


def running_tiers() -> TierForward | None:
    """The tiers of the forward that runs in this thread; `None` where none runs or all its rows are on tier 1."""
    return _running.forward


def route(layer: MoELayer, forward: TierForward | None, *args: Any, **kwargs: Any) -> Any:
    """What a layer's router says of its inputs when held to the tiers of `forward`, whatever the forward around it is.

    Hooks on the router do not run.

    Args:
        layer ([`~ordmoe_peft.moe_layers.MoELayer`]): the router's layer.
        forward ([`TierForward`], *optional*): the tiers; the router's own choice without.
        args, kwargs: the router's inputs.
    """
    with nullcontext() if forward is None else _TierSelection(_RouterEntry(layer), forward):
        return layer.router.forward(*args, **kwargs)


def adapter_config(model: nn.Module) -> OrdMoEConfig:
    """The active OrdMoE adapter's configuration, else that of any, else [`OrdMoEConfig`]'s defaults."""
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapter", None)
    if isinstance(active, str) and isinstance(configs.get(active), OrdMoEConfig):
        return configs[active]
    return next((config for config in configs.values() if isinstance(config, OrdMoEConfig)), OrdMoEConfig())


# -------------------------------------------------------------------------------------------------------------- hooks
def install_tier_hooks(model: nn.Module) -> list[MoELayer]:
    """Put the hooks on `model`'s text model and routers, where they are not yet. Returns its MoE layers.

    Raises:
        [`OrdMoEModelError`]: a layer has no router of a known kind, or one whose choice cannot be intercepted.
    """
    layers = find_moe_layers(model)
    missing = [layer for layer in layers if layer.router is None or not hasattr(layer.router, "tier_hook_handles")]
    for layer in missing:
        check_router(layer)
    for layer in missing:
        layer.router.tier_hook_handles = [
            layer.router.register_forward_pre_hook(_RouterEntry(layer)),
            layer.router.register_forward_hook(_leave_router, with_kwargs=True, always_call=True),
        ]
    decoder = text_model(model, layers)
    if not hasattr(decoder, "tier_hook_handles"):
        decoder.tier_hook_handles = [
            decoder.register_forward_pre_hook(_enter_text_model, with_kwargs=True),
            decoder.register_forward_hook(_leave_text_model, always_call=True),
        ]
    return layers


def remove_tier_hooks(model: nn.Module) -> None:
    """Take all hooks of [`install_tier_hooks`] off `model`."""
    for module in model.modules():
        for handle in module.__dict__.pop("tier_hook_handles", ()):
            handle.remove()


def check_router(layer: MoELayer) -> None:
    """Run the layer's router on two tokens of noise and see that it chooses K of E scores by one `torch.topk`.

    Raises:
        [`OrdMoEModelError`]: it does not.
    """
    if layer.router is None:
        raise OrdMoEModelError(
            f"{layer.block_name} has experts but no router that has one row of weights per expert; its tiers are "
            "unknown."
        )
    weight = layer.router.weight
    if weight.device.type == "meta":
        return
    everything = TierPlan(torch.ones(1, dtype=torch.long), 1, "uniform", frozenset(), seed=0, step=0)
    probe = _TierSelection(_RouterEntry(layer), TierForward(everything, sequence_length=2, past_length=0))
    noise_TH = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        with torch.no_grad(), probe:
            layer.router(noise_TH)
    except TypeError as error:
        raise OrdMoEModelError(f"{layer.router_name} ({type(layer.router).__name__}): {error}") from error
    if probe.selections != 1:
        raise OrdMoEModelError(
            f"{layer.router_name} ({type(layer.router).__name__}) chose experts by {probe.selections} calls of "
            f"torch.topk over its {layer.num_experts} scores where tiers need exactly one; this router is not "
            "supported."
        )


def check_weights(layer: MoELayer) -> None:
    """See that the layer's router returns the weights of its choice, so that they can be scaled.

    Raises:
        [`OrdMoEModelError`]: it does not.
    """
    weight = layer.router.weight
    if weight.device.type == "meta":
        return
    with torch.no_grad():
        output = layer.router.forward(weight.new_zeros(2, weight.shape[1]))
    weights_TK = router_weights(output, layer.top_k)
    if weights_TK is None or len(weights_TK) != 2:
        raise OrdMoEModelError(
            f"{layer.router_name} ({type(layer.router).__name__}) does not return the weights of its chosen experts, "
            "which tier_weights='match' scales: set tier_weights='router'."
        )


class _RouterEntry:
    """Forward pre-hook of a router: while it runs, its top-k is answered by tier."""

    def __init__(self, layer: MoELayer):
        self.index, self.num_experts, self.top_k = layer.index, layer.num_experts, layer.top_k
        self.router_name = layer.router_name

    def __call__(self, module: nn.Module, args: tuple) -> None:
        forward = _running.forward
        if forward is None or self.index not in forward.plan.layers:
            return
        _running.selection = _TierSelection(self, forward)
        _running.selection.__enter__()


def _leave_router(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    selection, _running.selection = _running.selection, None
    if selection is None:
        return None
    selection.__exit__(None, None, None)
    if output is None:  # the router failed, and says why itself
        return None
    if selection.selections != 1:
        raise OrdMoERuntimeError(
            f"{selection.router.router_name} chose experts {selection.selections} times in one forward; its tiers "
            "would be wrong."
        )
    if selection.forward.plan.tier_weights == "router":
        return None
    weights_TK = module.forward(*args, **kwargs)[WEIGHTS]
    return _matched(output, weights_TK, selection.forward.tier_of_token(len(weights_TK), weights_TK.device))


def _matched(output: tuple, top_weights_TK: torch.Tensor, tier_T: torch.Tensor) -> tuple:
    """A router's output with each token's weights scaled to the sum of those that its own choice would have."""
    weights_TK = output[WEIGHTS]
    tiny = torch.finfo(weights_TK.dtype).tiny
    scale_T1 = top_weights_TK.sum(-1, keepdim=True) / weights_TK.sum(-1, keepdim=True).clamp(min=tiny)
    weights_TK = torch.where((tier_T == 1).unsqueeze(1), weights_TK, weights_TK * scale_T1)
    return (*output[:WEIGHTS], weights_TK, *output[WEIGHTS + 1 :])


def _enter_text_model(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    _running.forward = None  # an interrupted forward leaves its own: its closing hooks do not run
    plan = _requested.get().get(id(module))
    if plan is None or plan.is_top:
        return
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    cache = kwargs.get("past_key_values")
    _running.forward = TierForward(plan, inputs.shape[1], cache.get_seq_length() if cache is not None else 0)
    if module.training and torch.is_grad_enabled():
        wrap_checkpointing(module, _carry_tiers)


def _leave_text_model(module: nn.Module, args: tuple, output: Any) -> None:
    _running.forward = None


def _carry_tiers(checkpoint: Callable) -> Callable:
    """A checkpoint function whose recomputation sees the tiers of its first run."""

    def checkpoint_with_tiers(function: Callable, *args: Any, **kwargs: Any) -> Any:
        forward = _running.forward

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            before, _running.forward = _running.forward, forward
            try:
                return function(*run_args, **run_kwargs)
            finally:
                _running.forward = before

        return checkpoint(run, *args, **kwargs)

    return checkpoint_with_tiers


# ---------------------------------------------------------------------------------------------------------- selection
class _TierSelection(TorchFunctionMode):
    """Answers a router's `torch.topk` over its E scores with the K experts of each token's tier."""

    def __init__(self, router: _RouterEntry, forward: TierForward):
        super().__init__()
        self.router, self.forward = router, forward
        self.selections = 0
        # What a group-limited router chooses from, the same before it left groups out, and which experts it left out.
        self.limited: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.masked_fill and len(args) > 1 and args[1].shape == args[0].shape == result.shape:
            self.limited = (result, args[0], args[1])
        if func not in (torch.topk, torch.Tensor.topk) or not self._is_selection(result.indices, *args, **kwargs or {}):
            return result
        self.selections += 1
        scores_TE = args[0] if args else kwargs["input"]
        is_limited = self.limited is not None and self.limited[0] is scores_TE
        _, all_scores_TE, left_out_TE = self.limited if is_limited else (None, scores_TE, None)
        index_TK = self._choose(all_scores_TE, left_out_TE, result.indices)
        return torch.return_types.topk((all_scores_TE.gather(1, index_TK), index_TK))

    def _is_selection(self, index_TK, input, k, dim=-1, largest=True, sorted=True) -> bool:
        # Group-limited routers also rank groups, on 3-D tensors; only the choice among all experts is the tier's.
        is_over_experts = input.dim() == 2 and input.shape[1] == self.router.num_experts and dim in (-1, 1)
        return is_over_experts and largest and k == self.router.top_k

    def _choose(
        self, scores_TE: torch.Tensor, left_out_TE: torch.Tensor | None, top_k_index_TK: torch.Tensor
    ) -> torch.Tensor:
        plan, top_k = self.forward.plan, self.router.top_k
        ranked_TE = rank_experts(scores_TE.detach(), top_k_index_TK, left_out_TE, plan.num_tiers * top_k)
        if plan.grouping == "random":
            row_T, position_T = self._places(len(scores_TE), scores_TE.device)
            ranked_TE = random_order(ranked_TE, top_k, row_T, position_T, plan.seed, plan.step, self.router.index)
        return self.forward.choice(ranked_TE, top_k_index_TK)

    def _places(self, num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of each token, counted over the whole sequence, cached part included."""
        token_T = torch.arange(num_tokens, device=device)
        length, num_samples = self.forward.sequence_length, self.forward.plan.num_samples
        row_T = token_T // length
        if len(self.forward.plan.tiers) > 1:  # what generation repeats, as for beams, is one row
            row_T = row_T // self.forward.plan.rows_per_tier(num_tokens, length)
        places = self.forward.plan.places
        position_T = token_T % length + self.forward.past_length if places is None else places.reshape(-1).to(device)
        sample_T = row_T % num_samples if num_samples else row_T
        return sample_T + self.forward.plan.first_sample, position_T
