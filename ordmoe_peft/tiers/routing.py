"""Hold forward passes to tiers: `with tier_routing(model, tier=3): model(**inputs)`.

The router's own code stays the judge: hooks on routers put a [`~ordmoe_peft.tiers.selection.TierSelection`] around it,
which answers its choice. The tiers come from the running forward of the text model (`forward.py`); without any, the
hooks return at once.
"""

import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import logging

from ..adapter.config import OrdMoEConfig
from ..errors import OrdMoEConfigError, OrdMoEModelError, OrdMoERuntimeError
from ..experts.weight_lora import run_again
from ..forward import (
    RunningForward,
    install_forward_hooks,
    remove_forward_hooks,
    requested_plans,
    running_forward,
    tiers_requested,
)
from ..moe_model import MoELayer, MoEModel, module_of
from ..router_output import WEIGHTS
from .plan import RandomDraw, TierPlan, TierSettings, make_plan
from .router_check import check_router, is_without_numbers
from .selection import RoundSelection, RouterSizes, TierSelection


logger = logging.get_logger(__name__)

# Attribute of text models in an adapted model.
CONFIGS = "adapter_configs"
# Attribute of routers that were checked, and have their hooks if they rank experts.
SIZES = "tier_router_sizes"


class _Running(threading.local):
    """The selection of the router that runs in this thread."""

    selection: TierSelection | None = None


_running = _Running()


@contextmanager
def tier_routing(
    model: nn.Module,
    tier: int | Sequence[int] | torch.Tensor,
    *,
    num_tiers: int | None = None,
    grouping: str | None = None,
    layer_scope: str | Sequence[int] | None = None,
    tier_weights: str | None = None,
    seed: int | None = None,
    draw: RandomDraw | None = None,
    **renamed: Any,
) -> Iterator[None]:
    """Within the block, every forward and `generate` of `model` activates the experts of `tier` alone.

    Settings that are not given come from the active OrdMoE adapter, or are [`OrdMoEConfig`]'s defaults on a model
    without one. Blocks nest; the inner one holds. A model with several text models (Qwen3-Omni: thinker and talker) is
    held in all of them; a part of it given as `model`, in that part alone. Other threads and other models are not
    affected: a thread that `generate` runs in is to be started with `contextvars.copy_context().run`. Compiled modules
    run uncompiled within the block, unless all rows are on tier 1.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        tier (`int`, sequence of `int`, or `torch.Tensor` of shape `(B,)` or `(B, S)`): the tier of all rows, of each
            row, or of each position; tier 1 is the model as it is.
        num_tiers (`int`, *optional*): C.
        grouping (`str`, *optional*): `"uniform"`, `"high_only"` or `"random"`.
        layer_scope (`str` or list of `int`, *optional*): `"all"`, `"shallow"`, `"deep"`, or indices of MoE layers.
        tier_weights (`str`, *optional*): `"router"` or `"match"`.
        seed (`int`, *optional*): what `random` grouping draws from.
        draw ([`~ordmoe_peft.tiers.plan.RandomDraw`], *optional*): which of its draws. A row's is that of its place in
            the batch, so where generation repeats rows (beams, `num_return_sequences`) give a tier for each prompt, and
            with one prompt `RandomDraw(num_samples=1)`: repetitions then draw the same.
        renamed: `step`, `num_samples`, `first_sample` and `places`, which are fields of `draw` now.

    Raises:
        [`OrdMoEConfigError`]: the request does not fit the model, e.g. C·K > E.
        [`OrdMoEModelError`]: the model has no MoE layers, or some that tiers cannot be imposed on.
        [`OrdMoERuntimeError`]: from a forward in the block that cannot be held to its tiers: rows, positions or tokens
            are unknown, or a router did not run.
    """
    moe, config = MoEModel.of(model), adapter_config(model)
    settings = settings_of(
        config, num_tiers=num_tiers, grouping=grouping, layer_scope=layer_scope, tier_weights=tier_weights, seed=seed
    )
    plan = make_plan(moe.layers, tier, settings, _draw_of(draw, renamed))
    _install(moe, [moe.layers[index] for index in sorted(plan.layers)])
    plan = replace(plan, layers=ranked_layers(moe, plan))
    if settings.tier_weights == "match" != config.tier_weights:  # else it was checked with the adapter
        for index in sorted(plan.layers):
            check_weights(moe.layers[index])
    before = _running.selection
    try:
        with tiers_requested({owner: plan.of_layers(own) for owner, own in moe.text_models.items()}):
            yield
    finally:
        if _running.selection is not None and _running.selection is not before:
            _running.selection.__exit__(None, None, None)  # of a router that was interrupted: no hook closed it
            _running.selection = before


def settings_of(config: OrdMoEConfig, **given: Any) -> TierSettings:
    """The tier settings of a configuration, but for those that are given."""
    own = {name: getattr(config, name) for name in ("num_tiers", "grouping", "layer_scope", "tier_weights")}
    changes = {name: value for name, value in given.items() if value is not None}
    return TierSettings(**(own | {"seed": config.tier_seed} | changes))


def _draw_of(draw: RandomDraw | None, renamed: dict[str, Any]) -> RandomDraw:
    """The draw that was asked for, also by the names of its fields before 0.1. Remove these with 0.2."""
    if not renamed:
        return draw or RandomDraw()
    unknown = sorted(set(renamed) - {"step", "num_samples", "first_sample", "places"})
    if unknown:
        raise TypeError(f"tier_routing() got an unexpected keyword argument {unknown[0]!r}")
    if draw is not None:
        raise TypeError(f"tier_routing() got draw and {sorted(renamed)}, which are fields of it: give draw alone.")
    warnings.warn(
        f"{sorted(renamed)} of tier_routing are fields of its `draw` now: RandomDraw(step=…, num_samples=…, "
        "first_sample=…, positions=…).",
        FutureWarning,
        stacklevel=4,
    )
    return RandomDraw(**{{"places": "positions"}.get(name, name): value for name, value in renamed.items()})


def ranked_layers(moe: MoEModel, plan: TierPlan) -> frozenset[int]:
    """The layers in scope of a plan whose routers rank experts; the others route as usual, which is said once.

    Raises:
        [`OrdMoEConfigError`]: `layer_scope` lists one of the others, or there is none that ranks.
    """
    unranked = [index for index in sorted(plan.layers) if not router_sizes(moe.layers[index]).is_ranked]
    if not unranked:
        return plan.layers
    first = moe.layers[unranked[0]]
    reason = (
        f"the MoE layers {unranked} choose experts by something else than ranks of scores, as by a token's id: "
        f"{first.router_name} ({type(first.router).__name__})"
    )
    if not isinstance(plan.settings.layer_scope, str) or len(unranked) == len(plan.layers):
        raise OrdMoEConfigError(f"layer_scope={plan.settings.layer_scope!r}, but {reason}. Leave them out.")
    logger.warning_once(f"On all tiers alike, {reason}.")
    return plan.layers - {*unranked}


def route(layer: MoELayer, plan: TierPlan | None, *args: Any, with_lora: bool = True, **kwargs: Any) -> Any:
    """What a layer's router says of its inputs when held to a plan, whatever the forward around it is.

    Hooks on the router do not run.

    Args:
        layer ([`~ordmoe_peft.moe_model.MoELayer`]): the router's layer.
        plan ([`~ordmoe_peft.tiers.plan.TierPlan`], *optional*): the tiers; the router's own choice without.
        with_lora (`bool`, defaults to `True`): with the adapter on linear layers within the router. One around it does
            not count in any case.
        args, kwargs: the router's inputs.
    """
    router = layer.known_router
    selection = None if plan is None else _selection(router_sizes(layer), layer.index, plan, running_forward())
    with nullcontext() if selection is None else selection:
        return run_again(router, *args, with_lora=with_lora, **kwargs)


def router_sizes(layer: MoELayer) -> RouterSizes:
    """What was found of a layer's router as its hooks were put on."""
    return getattr(layer.known_router, SIZES, None) or RouterSizes.of(layer)


def _selection(sizes: RouterSizes, index: int, plan: TierPlan, forward: RunningForward | None) -> TierSelection:
    return (RoundSelection if sizes.by_rounds else TierSelection)(sizes, index, plan, forward)


def adapter_config(model: nn.Module) -> OrdMoEConfig:
    """The active OrdMoE adapter's configuration, else that of any, else [`OrdMoEConfig`]'s defaults.

    Of a part of an adapted model, as `get_base_model()` or a text model, it is the model's.
    """
    noted = (vars(module)[CONFIGS] for module in model.modules() if CONFIGS in vars(module))
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", None) or next(noted, {})
    adapted = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    active = [configs.get(name) for name in adapted.active_adapters] if adapted is not None else []
    ours = [config for config in (*active, *configs.values()) if isinstance(config, OrdMoEConfig)]
    return ours[0] if ours else OrdMoEConfig()


def note_adapter_configs(model: nn.Module, configs: dict[str, PeftConfig]) -> None:
    """Let the text models of `model` know the configurations of its adapters, for when a part is asked alone."""
    for owner in MoEModel.of(model).text_models:
        setattr(owner, CONFIGS, configs)


# -------------------------------------------------------------------------------------------------------------- hooks
def install_tier_hooks(model: nn.Module, layers: Collection[int] | None = None) -> MoEModel:
    """Put the hooks on `model`'s text models and on routers, where they are not yet. Returns its view.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        layers (collection of `int`, *optional*): indices of the MoE layers to be held to tiers; all by default.

    Raises:
        [`OrdMoEModelError`]: one of them has no router of a known kind, or one whose choice cannot be intercepted.
    """
    moe = MoEModel.of(model)
    _install(moe, moe.layers if layers is None else [moe.layers[index] for index in sorted(layers)])
    return moe


def _install(moe: MoEModel, wanted: Sequence[MoELayer]) -> None:
    # Layers may share a router. One without numbers, as in a plan, cannot run, and is tried when it has some.
    missing = {
        id(layer.known_router): layer
        for layer in wanted
        if not hasattr(layer.known_router, SIZES) and not is_without_numbers(layer)
    }
    sizes = [check_router(layer) for layer in missing.values()]
    for layer, size in zip(missing.values(), sizes, strict=True):
        setattr(layer.router, SIZES, size)
        chooses = layer.block if size.router_in_block else layer.known_router
        if size.is_ranked:
            chooses.tier_hook_handles = [
                chooses.register_forward_pre_hook(_RouterEntry(size)),
                chooses.register_forward_hook(_leave_router, with_kwargs=True, always_call=True),
            ]
    for owner in moe.text_models:
        install_forward_hooks(owner)


def remove_tier_hooks(model: nn.Module) -> None:
    """Take all hooks of [`install_tier_hooks`], and what [`note_adapter_configs`] noted, off `model`."""
    for module in model.modules():
        module.__dict__.pop(CONFIGS, None)
        module.__dict__.pop(SIZES, None)
        for handle in module.__dict__.pop("tier_hook_handles", ()):
            handle.remove()
    remove_forward_hooks(model)


def check_weights(layer: MoELayer) -> None:
    """See that the layer's router returns the weights of its choice, so that they can be scaled.

    Raises:
        [`OrdMoEModelError`]: it does not.
    """
    if not check_router(layer).has_weights:
        raise OrdMoEModelError(
            f"{layer.router_name} ({type(layer.router).__name__}) does not return the weights of its chosen experts, "
            "which tier_weights='match' scales: set tier_weights='router'."
        )


class _RouterEntry:
    """Forward pre-hook of a router, or of its block if that chooses: while it runs, its choice is answered by tier."""

    def __init__(self, router: RouterSizes):
        self.router = router

    def __call__(self, module: nn.Module, args: tuple) -> None:
        forward, router = running_forward(), id(module_of(module, self.router.router_in_block))
        # Several text models may run inside one another; the router belongs to one of them.
        while forward is not None:
            plan = forward.plan
            if plan is not None and router in plan.index_of_router:
                self._answer_by_tier(router, plan, forward)
                return
            forward = forward.outer
        for plan in requested_plans():
            if not plan.is_top and plan.index_of_router.get(router) in plan.layers:
                raise OrdMoERuntimeError(
                    f"{self.router.name} runs within tier_routing, but not within a forward of its text model, so its "
                    "tokens are on no tier: call the model itself, not a layer of it, nor its `forward`, and have it "
                    "checkpoint by transformers' activation_checkpointing_enable."
                )

    def _answer_by_tier(self, router: int, plan: TierPlan, forward: RunningForward) -> None:
        forward.routed.add(router)
        index = plan.index_of_router[router]
        if index in plan.layers:
            if _running.selection is not None:
                raise OrdMoERuntimeError(
                    f"{self.router.name} begins to choose while {_running.selection.router.name} does: which of them "
                    "the tiers are for is unknown. Leave one of the layers out of layer_scope."
                )
            _running.selection = _selection(self.router, index, plan, forward)
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
            f"{selection.router.name} chose experts {selection.selections} times in one forward; its tiers would be "
            "wrong."
        )
    if selection.plan.settings.tier_weights == "router":
        return None
    return _matched(output, run_again(module, *args, **kwargs)[WEIGHTS], selection)


def _matched(output: tuple, top_weights_TK: torch.Tensor, selection: TierSelection) -> tuple:
    """A router's output with each token's weights scaled to the sum of those that its own choice would have."""
    weights_TK, only_tier = output[WEIGHTS], selection.plan.only_tier
    if only_tier == 1:
        return output
    tiny = torch.finfo(weights_TK.dtype).tiny
    scale_T1 = top_weights_TK.sum(-1, keepdim=True) / weights_TK.sum(-1, keepdim=True).clamp(min=tiny)
    matched_TK = weights_TK * scale_T1
    if only_tier is None:
        is_top_T = selection.running.tier_of_token(weights_TK.device)[selection.tokens] == 1
        matched_TK = torch.where(is_top_T.unsqueeze(1), weights_TK, matched_TK)
    return (*output[:WEIGHTS], matched_TK, *output[WEIGHTS + 1 :])
