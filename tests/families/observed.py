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
        handles += [
            routed.layer.known_router.register_forward_pre_hook(_keep_inputs(routed), with_kwargs=True),
            experts.register_forward_pre_hook(_keep_index(routed), with_kwargs=True),
        ]
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
        routed.index.append(_index_in((*args, *kwargs.values())).flatten(0, -2))

    return hook


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
    holder, k_name = (router, "top_k") if hasattr(router, "top_k") else (router.config, "top_k_experts")
    top_k = getattr(holder, k_name)

    def choose(num: int, **groups: int) -> list[set[int]]:
        with ExitStack() as changes, torch.no_grad():
            changes.enter_context(patch.object(holder, k_name, num))
            for name, value in groups.items():
                changes.enter_context(patch.object(router, name, value))
            output = router.forward(*args, **kwargs)
        return [set(row) for row in _index_in(output).flatten(0, -2).tolist()]

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
