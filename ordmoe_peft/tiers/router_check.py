"""Whether a router's choice can be answered by tier: it is run on a few tokens of noise, and judged by what it does."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._compat import accelerate_hook, tree_leaves
from ..errors import OrdMoEModelError
from ..experts.weight_lora import forward_with
from ..moe_model import MoELayer
from ..router_output import read_router_output
from .plan import TierPlan, TierSettings
from .selection import RoundSelection, RouterSizes, TierSelection


# Tokens that a router is tried on: no side of a matrix, so that no weight is as large as scores are.
PROBE_TOKENS = 17
# What a router may raise when it is given other inputs than its block's.
FAILURES = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)
# Routers whose block does not do what they choose, by class.
WITHOUT_EFFECT = {
    "NllbMoeTop2Router": "its choice is not what its block runs: NllbMoeExperts reads the router's mask as indices, so "
    "that all tokens go to the experts 0 and 1 (transformers 5.23 and 5.24)",
}


@dataclass(frozen=True)
class _Trial:
    """A run of a router, or of its block, on noise.

    Args:
        selection ([`~ordmoe_peft.tiers.selection.TierSelection`]): what answered its choice.
        output (`Any`): what it returned; `None` where it raised `error`.
        calls_matrix (`bool`): whether it called the module that has the router's matrix.
        again (`Callable`): runs it again with another kind of selection, for another tier.
    """

    selection: TierSelection
    output: Any = None
    error: Exception | None = None
    calls_matrix: bool = True
    again: "Callable[..., _Trial] | None" = None


def check_router(layer: MoELayer) -> RouterSizes:
    """Run the layer's router on a few tokens of noise and see how it chooses K of E scores.

    That is by one `torch.topk` of its own or of its block, by rounds that each take the largest score, or without
    regard to what a token holds, as by its id. Inputs that it needs beside hidden states are zeros.

    Raises:
        [`OrdMoEModelError`]: it does not, or it leaves experts out in a way that is not recognised.
    """
    router = layer.known_router
    named = f"{layer.router_name} ({type(router).__name__})"
    if type(router).__name__ in WITHOUT_EFFECT:
        raise OrdMoEModelError(f"{named}: {WITHOUT_EFFECT[type(router).__name__]}. Its tiers would mean nothing.")
    if not layer.top_k:
        raise OrdMoEModelError(
            f"{named} does not say how many experts a token gets, nor does {layer.block_name} (`top_k`, "
            "`num_experts_per_tok` and the like), so it has no tiers."
        )
    sizes = RouterSizes.of(layer)
    with _ready(layer):
        return sizes if is_without_numbers(layer) else _tried(layer, named, sizes)


def _tried(layer: MoELayer, named: str, sizes: RouterSizes) -> RouterSizes:
    """What trials of the router tell; `named` is what messages call it."""
    is_broken = not bool(layer.router_weight.isfinite().all())  # now: accelerate takes the weights away after a run
    trials = list(_trials(layer, layer.known_router, sizes))
    if all(trial.error is not None for trial in trials):
        error = trials[0].error
        raise OrdMoEModelError(f"{named} cannot be run on hidden states alone: {error}") from error
    found = _chosen(trials)
    if not found and _is_fixed(layer):
        return replace(sizes, is_ranked=False, may_limit=False)
    found = found or _by_rounds(layer, sizes) or _in_block(layer, sizes)
    count = found[0].selection.selections if found else 0
    if count != 1:
        raise OrdMoEModelError(
            f"{named} chose experts by {count} calls of torch.topk over its {layer.num_experts} scores where tiers "
            "need exactly one; this router is not supported."
        )
    if found[0].selection.hides_ranks:
        raise OrdMoEModelError(
            f"{named} leaves experts out of its choice, or changes their ranks, in a way that is not recognised, so "
            "the ranks below those that it chooses are unknown; this router is not supported."
        )
    if not (_returns_its_choice(layer, found[0]) and _uses_its_choice(layer, found[0])):
        raise OrdMoEModelError(
            f"{named} gives tokens to other experts than those that it chose by torch.topk, so tiers cannot be imposed "
            "by answering that; this router is not supported."
        )
    # Its inputs are of the first shape that it took, and perhaps of another that it takes as well.
    others = [trial for trial in found[1:] if trial.selection.selections == 1 and not trial.selection.hides_ranks]
    return _judged(layer, [found[0], *others], is_broken)


def calls_experts(layer: MoELayer) -> bool:
    """Whether the layer's block calls experts that are modules, or the linear layers in them, as it is run on noise.
    `True` where it cannot be run on hidden states alone."""
    calls: list[bool] = []
    # An expert whose forward was replaced may call no linear layers, and counts as called itself.
    experts = [module for module in layer.experts.children() if "forward" in vars(module)]
    linears = [module for module in layer.experts.modules() if isinstance(module, nn.Linear)]
    with ExitStack() as stack, _ready(layer):
        if is_without_numbers(layer):
            return True
        for linear in (*experts, *linears):
            stack.callback(linear.register_forward_pre_hook(lambda *_: calls.append(True)).remove)
        trials = list(_trials(layer, layer.block, RouterSizes.of(layer)))
    return bool(calls) or all(trial.error is not None for trial in trials)


def _judged(layer: MoELayer, found: list[_Trial], is_broken: bool) -> RouterSizes:
    """What a router is by the trials in which it chose once, and by whether its weights are NaN or infinite."""
    sizes, chosen = found[0].selection.router, read_router_output(layer, found[0].output)
    is_own = not sizes.router_in_block and all(part is None or len(part) == PROBE_TOKENS for part in chosen)
    sum_T = chosen.weights_TK.float().sum(-1) if is_own and chosen.weights_TK is not None else None
    return replace(
        sizes,
        score_dims=frozenset.union(*(trial.selection.router.score_dims for trial in found)),
        # What a router without numbers yet does to its scores is seen when it has some.
        may_limit=is_broken or any(trial.selection.limit is not None for trial in found),
        has_weights=sum_T is not None,
        is_readable=is_own and not any(part is None for part in chosen),
        renormalises=sum_T is not None and torch.allclose(sum_T, sum_T[:1], rtol=0.01),
        calls_matrix=all(trial.calls_matrix for trial in found),
    )


def is_without_numbers(layer: MoELayer) -> bool:
    """Whether the router's matrix is on the meta device, as in a plan; one that accelerate offloaded is not."""
    return layer.router_weight.device.type == "meta" and accelerate_hook(layer.router_matrix_owner) is None


@contextmanager
def _ready(layer: MoELayer) -> Iterator[None]:
    """Within the block, the router has the weights that accelerate offloaded, and random numbers are its own. At its
    end, buffers of the block are what they were."""
    owner = layer.router_matrix_owner
    with ExitStack() as stack, torch.no_grad():
        for module in {layer.known_router, owner}:
            stack.enter_context(align_module_device(module))
        device = layer.router_weight.device
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for buffer in layer.block.buffers():
            if not buffer.is_meta:
                stack.callback(_put_back, buffer, buffer.clone())
        yield


def _put_back(buffer: torch.Tensor, before: torch.Tensor) -> None:
    if not torch.equal(buffer, before):
        buffer.copy_(before)


def _noise(layer: MoELayer, width: int) -> torch.Tensor:
    """Hidden states (`torch.Tensor` of shape `(T, width)`) that differ so much that tokens keep different groups."""
    weight = layer.router_weight
    noise = torch.arange(PROBE_TOKENS * width, device=weight.device).view(PROBE_TOKENS, -1)
    return (1e3 * noise.sin()).cos().to(weight.dtype)


def _trials(layer: MoELayer, module: nn.Module, sizes: RouterSizes) -> Iterator[_Trial]:
    """Runs of the router or of its block, with hidden states of shape `(T, H)` and `(1, T, H)`, each with the further
    inputs that it cannot do without and with all, up to the first that chooses."""
    width = next(weight.shape[1] for weight in layer.known_router.parameters() if weight.dim() == 2)
    for hidden in (noise_TH := _noise(layer, width), noise_TH.unsqueeze(0)):
        for is_given, score_dim in product((_is_needed, _is_any), (2, 3)):
            inputs = _inputs(layer, module, hidden, is_given)
            trial = _run(layer, module, inputs, TierSelection, replace(sizes, score_dims=frozenset({score_dim})))
            yield trial
            if trial.selection.selections:
                break


def _chosen(trials: Iterable[_Trial]) -> list[_Trial]:
    """The trials in which a choice was seen."""
    return [trial for trial in trials if trial.selection.selections]


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _is_any(parameter: inspect.Parameter) -> bool:
    return True


Inputs: TypeAlias = tuple[torch.Tensor, dict[str, torch.Tensor]]  # the first argument, and others by name


def _inputs(layer: MoELayer, module: nn.Module, hidden: torch.Tensor, is_given: Callable) -> Inputs:
    """Hidden states, and zeros for other arguments: for ids of tokens, or as a bias for each score."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    others = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in named][1:]
    ids, bias = hidden[..., 0].long() * 0, hidden.new_zeros(layer.num_scores)
    zeros = {p.name: ids if p.name.endswith("ids") else bias for p in others if is_given(p)}
    return hidden, zeros


def _run(
    layer: MoELayer,
    module: nn.Module,
    inputs: Inputs,
    kind: type[TierSelection],
    sizes: RouterSizes,
    tier: int = 1,
) -> _Trial:
    plan = TierPlan(torch.tensor([tier]), TierSettings(num_tiers=tier), frozenset())
    selection, owner, calls = kind(sizes, layer.index, plan), layer.router_matrix_owner, []
    hooks = [owner.register_forward_pre_hook(lambda *_: calls.append(True))]
    for part in module.modules():
        if isinstance(part, BaseTunerLayer):
            hooks.append(part.register_forward_hook(lambda part, args, output: selection.begin_at(output)))
    try:
        with selection:
            output = module.forward(inputs[0].clone(), **inputs[1])  # hooks on it are for the model's own inputs
    except FAILURES as error:
        return _Trial(selection, error=error)
    finally:
        for hook in hooks:
            hook.remove()
    again = partial(_run, layer, module, inputs, sizes=sizes)
    return _Trial(selection, output, None, owner is module or bool(calls), again)


def _is_fixed(layer: MoELayer) -> bool:
    """Whether the router chooses the same experts for all hidden states and weights, where all else is equal."""
    router, chosen = layer.known_router, []
    weight = layer.router_weight
    for sign in (1, -1):
        matrix = sign * _noise(layer, weight.shape[1]).repeat(-(-len(weight) // PROBE_TOKENS), 1)[: len(weight)]
        hidden = _noise(layer, weight.shape[1])
        for shaped in (hidden, hidden.unsqueeze(0)):
            first, others = _inputs(layer, router, shaped, _is_needed)
            try:
                output = forward_with(router, {layer.router_matrix: matrix}, first, **others)
            except FAILURES:
                continue
            chosen.append(read_router_output(layer, output).index_TK)
    first = chosen[0] if chosen else None
    return first is not None and all(index is not None and bool((index == first[0]).all()) for index in chosen)


def _by_rounds(layer: MoELayer, sizes: RouterSizes) -> list[_Trial]:
    """Runs in which the router chose the experts of tier 2 by rounds, if it does so."""
    sizes = replace(sizes, may_limit=False, by_rounds=True, score_dims=frozenset({2, 3}))
    if 2 * layer.top_k > layer.num_experts:
        return []
    hidden = _noise(layer, layer.router_weight.shape[1])
    inputs = [_inputs(layer, layer.known_router, shaped, _is_needed) for shaped in (hidden, hidden.unsqueeze(0))]
    trials = [_run(layer, layer.known_router, given, RoundSelection, sizes, tier=2) for given in inputs]
    ran = [trial for trial in trials if trial.error is None]
    return ran if all(trial.selection.selections and _is_within_tier(layer, trial) for trial in ran) else []


def _returns_its_choice(layer: MoELayer, trial: _Trial) -> bool:
    """Whether the indices that a router returned, if it does, are those that it chose."""
    index_TK, chosen_TK = read_router_output(layer, trial.output).index_TK, trial.selection.index_TK
    is_of_experts = layer.num_scores == layer.num_experts and not trial.selection.router.router_in_block
    if index_TK is None or chosen_TK is None or not is_of_experts or index_TK.shape != chosen_TK.shape:
        return True  # it does not say
    return bool((index_TK.sort(1).values == chosen_TK.sort(1).values).all())


class _OtherIndices(TierSelection):
    """Answers with the indices of a tier and the router's own scores."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        answer = super().__torch_function__(func, types, args, kwargs)
        if self.selections and isinstance(answer, torch.return_types.topk):
            return torch.return_types.topk((func(*args, **(kwargs or {})).values, answer.indices))
        return answer


def _uses_its_choice(layer: MoELayer, trial: _Trial) -> bool:
    """Whether what was returned depends on the indices that were chosen; a threshold depends on their scores alone."""
    if trial.again is None or trial.selection.router.by_rounds or 2 * layer.top_k > layer.num_experts:
        return True
    other = trial.again(kind=_OtherIndices, tier=2)
    parts = zip(tree_leaves(trial.output), tree_leaves(other.output), strict=False)
    return other.error is not None or any(
        isinstance(part, torch.Tensor) and (part.shape != changed.shape or not torch.equal(part, changed))
        for part, changed in parts
    )


def _is_within_tier(layer: MoELayer, trial: _Trial) -> bool:
    """Whether the experts that a router returned, as indices or as a mask, are of the tier that it was held to."""
    parts = trial.output if isinstance(trial.output, tuple) else (trial.output,)
    assert isinstance(trial.selection, RoundSelection)
    hidden_TE = trial.selection.hidden_TE
    for part in parts:
        if isinstance(part, torch.Tensor) and not part.is_floating_point():
            if part.shape[-1] == layer.num_experts:
                return not (part.reshape(hidden_TE.shape).bool() & hidden_TE).any() and bool(part.any())
            if part.shape[-1] == layer.top_k:
                index_TK = part.reshape(len(hidden_TE), -1)
                is_distinct = all(len({*chosen}) == layer.top_k for chosen in index_TK.tolist())
                return is_distinct and not hidden_TE.gather(1, index_TK).any()
    return False


def _in_block(layer: MoELayer, sizes: RouterSizes) -> list[_Trial]:
    """Runs of the block in which it chose by its router's scores, if it does so."""
    sizes = replace(sizes, router_in_block=layer.router_name.removeprefix(f"{layer.block_name}."))
    return _chosen(_trials(layer, layer.block, sizes))
