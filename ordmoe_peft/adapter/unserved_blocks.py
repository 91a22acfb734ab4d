"""MoE blocks of a model that its MoE layers' view leaves out, found by what they hold."""

import re
from collections.abc import Sequence

from torch import nn

from ..errors import OrdMoEModelError
from ..moe_model import is_fused_experts, unwrapped, without_wrappers


def unserved_moe_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks in decoder layers that route among experts which are not of transformers' experts interface.

    Such experts are modules of one class in a list, or stacks of matrices in a class without the interface's flags.
    Beside them is a router: a matrix with a row for each expert, as wide as the experts' input.
    """
    modules = {without_wrappers(name): module for name, module in model.named_modules() if "lora_" not in name}
    blocks = [
        _block_of(name, modules)
        for name, module in modules.items()
        if re.fullmatch(r".*\.\d+\..*", name) and not is_fused_experts(module)
    ]
    return list(dict.fromkeys(block for block in blocks if block))


def _block_of(name: str, modules: dict[str, nn.Module]) -> str:
    """The block whose experts the module `name` holds, if it holds any: the module itself, what holds it, or what holds
    that, up to the decoder layer."""
    num_experts, widths = _experts_in(modules[name])
    block = name
    for _ in range(3):
        if (
            num_experts > 1
            and _is_within_layer(block)
            and _has_router(modules[block], modules[name], num_experts, widths)
        ):
            return block
        block = block.rpartition(".")[0]
    return ""


def _is_within_layer(name: str) -> bool:
    return re.search(r"\.\d+(\.|$)", name) is not None


def check_all_served(model: nn.Module, wish: str) -> None:
    """Raise [`OrdMoEModelError`] if MoE blocks of `model` would be left out of `wish`."""
    blocks = unserved_moe_blocks(model)
    if blocks:
        raise OrdMoEModelError(
            f"{wish} cannot cover all MoE layers of {type(unwrapped(model)).__name__}: in {_shortened(blocks)} the "
            "experts are not of transformers' experts interface (fused, with `use_experts_implementation`). Load the "
            "model with transformers' own class for its architecture, if there is one; else adapt "
            "`attention` alone, with `layer_scope` a list of the layers that are found."
        )


def check_scope_is_served(model: nn.Module, layer_scope: str | Sequence[int]) -> None:
    """Raise [`OrdMoEModelError`] if `layer_scope` counts MoE layers of `model` of which some cannot be held to tiers.

    A list of indices means those that are found.
    """
    if isinstance(layer_scope, str):
        check_all_served(model, f"layer_scope={layer_scope!r}")


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more blocks" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _experts_in(module: nn.Module) -> tuple[int, set[int]]:
    """How many experts `module` itself holds, if they may be such, and the sides of their matrices."""
    children = list(module.children())
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len({type(child) for child in children}) == 1:
        linears = [linear for linear in children[0].modules() if isinstance(linear, nn.Linear)]
        sides = {side for linear in linears for side in (linear.in_features, linear.out_features)}
        sides |= {side for weight in children[0].parameters() if weight.dim() == 2 for side in weight.shape}
        return len(children), sides
    stacks = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
    if len(stacks) > 1 and len({len(stack) for stack in stacks}) == 1:
        return len(stacks[0]), {side for stack in stacks for side in stack.shape[1:]}
    return 0, set()


def _has_router(block: nn.Module, experts: nn.Module, num_experts: int, widths: set[int]) -> bool:
    """Whether `block` has, beside `experts`, a matrix with a row for each expert and as many columns as one side of
    theirs, or one with a column for each; wider than experts are many, since a square matrix routes nothing."""
    beside = [
        block,
        *(part for child in block.children() if child is not experts for part in (child, *child.children())),
    ]
    return any(
        weight.dim() == 2 and min(weight.shape) == num_experts < max(weight.shape) and max(weight.shape) in widths
        for part in beside
        if part is not experts or part is block
        for weight in part.parameters(recurse=False)
    )
