"""What a model routed, seen by hooks, and the ranks of a router's experts by its own code: none of the package's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from ordmoe_peft.moe_model import MoELayer, MoEModel


@dataclass
class Routed:
    """One MoE layer's routing, a list entry for each time that it ran.

    Args:
        inputs (`list` of `(args, kwargs)`): what the router was given.
        index (`list` of `torch.Tensor` of shape `(T, K)`): the experts that were given the tokens.
    """

    layer: MoELayer
    inputs: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    index: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def observed(model: nn.Module) -> Iterator[list[Routed]]:
    """The routing of all MoE layers of `model`, wrapped by PEFT or not, within the block."""
    seen, handles = [Routed(layer) for layer in MoEModel.of(model).layers], []
    for routed in seen:
        block, name = routed.layer.experts_name.rpartition(".")[::2]
        experts = getattr(model.get_submodule(block), name)  # the outermost wrapper
        router = routed.layer.known_router
        handles.append(router.register_forward_pre_hook(_keep_inputs(routed), with_kwargs=True))
        if type(router).__name__ in GIVEN_BY_ROUTER:
            handles.append(router.register_forward_hook(_keep_output(routed)))
        else:
            handles.append(experts.register_forward_pre_hook(_keep_index(routed), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep_inputs(routed: Routed):
    def hook(module, args, kwargs):
        routed.inputs.append((args, kwargs))

    return hook


def _keep_index(routed: Routed):
    def hook(module, args, kwargs):
        values = (*args, *kwargs.values())
        index = _index_in(values).flatten(0, -2)
        if type(routed.layer.router).__name__ == "SwitchTransformersTop1Router":  # a mask
            index = index.argmax(-1, keepdim=True)
        elif type(routed.layer.router).__name__ == "ZayaRouter":  # expert 0 with no weight stands for skipping
            (weights,) = [value for value in values if value.shape == index.shape and value is not index][-1:]
            index = index.masked_fill(weights == 0, routed.layer.num_experts)
        routed.index.append(index)

    return hook


def _keep_output(routed: Routed):
    def hook(module, args, output):
        routed.index.append(GIVEN_BY_ROUTER[type(module).__name__](output))

    return hook


def _of_scores(output) -> torch.Tensor:
    """Of Llama 4, where all experts run, and those that are not chosen have scores of 0."""
    scores_TE, _ = output
    assert ((scores_TE > 0).sum(1) == 1).all()
    return scores_TE.argmax(1, keepdim=True)


def _of_sorted_rows(output) -> torch.Tensor:
    """Of JetMoE, where rows are sorted by expert."""
    _, token, _, sizes, logits_TE = output
    expert = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.stack([expert[token == index] for index in range(len(logits_TE))])


# Routers whose experts are not given indices: class → the indices (T, K) in what it returns.
GIVEN_BY_ROUTER = {"Llama4Router": _of_scores, "JetMoeTopKGating": _of_sorted_rows}
# Routers that rank by numbers that they return, or nearly: class → the scores (T, E) in what it returns.
RANKED_BY = {
    "PhimoeTopKRouter": lambda router, output: output[0],
    "SwitchTransformersTop1Router": lambda router, output: output[2].flatten(0, -2),
    "ZayaRouter": lambda router, output: output[0].softmax(-1) + router.balancing_biases,
}


def _index_in(values) -> torch.Tensor:
    (index,) = [value for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.long][:1]
    return index


def own_ranks(layer: MoELayer, inputs: tuple[tuple, dict[str, Any]], num_tiers: int = 3) -> torch.Tensor:
    """The experts of each token from rank 1 on (`torch.Tensor` of shape `(T, E)`), by the router's own code.

    The expert of rank n is the one that the router chooses as one of n and not as one of n − 1. Those that it chooses
    as it is come first. Where it leaves out groups of experts, the ranks end with the groups that it keeps if the tiers
    find room there; else the groups are as if they were not.
    """
    router, (args, kwargs) = layer.known_router, inputs
    if type(router).__name__ in RANKED_BY:
        with torch.no_grad():
            scores_TE = RANKED_BY[type(router).__name__](router, router.forward(*args, **kwargs))
        return scores_TE.argsort(dim=-1, descending=True)
    holder, k_name, run = router, "top_k", router.forward
    if type(router).__name__ == "DbrxRouter":  # gives scores alone
        holder, run = layer.block, lambda hidden: layer.block.route_tokens_to_experts(router.forward(hidden))
    elif not hasattr(router, "top_k"):
        holder, k_name = router.config, "top_k_experts"
    top_k = getattr(holder, k_name)

    def choose(num: int, **groups: int) -> list[set[int]]:
        with ExitStack() as changes, torch.no_grad():
            changes.enter_context(patch.object(holder, k_name, num))
            for name, value in groups.items():
                changes.enter_context(patch.object(router, name, value))
            output = run(*args, **kwargs)
        if type(router).__name__ == "Llama4Router":  # scores of 0 are of those that are not chosen
            return [set(row.nonzero().flatten().tolist()) for row in output[0]]
        of_output = GIVEN_BY_ROUTER.get(type(router).__name__, _index_in)
        return [set(row) for row in of_output(output).flatten(0, -2).tolist()]

    last, groups = layer.num_experts, {}
    num_group = getattr(router, "num_group", 1)
    if num_group is not None and num_group > 1:
        kept = layer.num_experts // num_group * router.topk_group
        last, groups = (kept, {}) if kept >= num_tiers * top_k else (last, {"topk_group": num_group})
    top, ranked = choose(top_k), [[] for _ in choose(1)]
    for num in range(1, last + 1):
        for order, chosen in zip(ranked, choose(num, **groups), strict=True):
            (new,) = chosen - set(order)
            order.append(new)
    return torch.tensor(
        [sorted(order, key=lambda expert: expert not in first) for order, first in zip(ranked, top, strict=True)]
    )
