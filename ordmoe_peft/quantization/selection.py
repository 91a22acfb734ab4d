"""What is packed in 4 bits and what never is, by name and shape alone."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import OrdMoEModelError
from ..moe_model import MoELayer, MoEModel, is_fused_experts, without_wrappers
from .storage import BLOCK_SIZE, logical_shape


# What a module within a MoE block is called when its linear layers route.
ROUTER_NAMES = {"router", "gate"}


def stack_readers(layers: list[MoELayer]) -> dict[str, str]:
    """The names of all experts' own parameters, each with the module whose forward reads it.

    Beside routed experts that is what shared experts hold in stacks. A module of transformers' experts interface reads
    its own; elsewhere that is the block's child that holds them, or the block itself where that has no forward.
    """
    readers: dict[str, str] = {}
    for layer in layers:
        names = [f"{layer.experts_name}.{projection}" for projection in layer.projections]
        if layer.kind == "fused":
            readers |= dict.fromkeys(names, layer.experts_name)
            names = []
        for name in [*names, *_shared_stacks(layer)]:
            child, *within = name.removeprefix(f"{layer.block_name}.").split(".")
            has_forward = within and type(layer.block.get_submodule(child)).forward is not nn.Module.forward
            readers[name] = f"{layer.block_name}.{child}" if has_forward else layer.block_name
    return readers


def _shared_stacks(layer: MoELayer) -> list[str]:
    """The stacks of a block's shared experts, which every token goes through (inkling)."""
    return [
        f"{layer.block_name}.{without_wrappers(name)}.{stack}"
        for name, module in layer.block.named_modules()
        if "Expert" in type(module).__name__ and "shared" in name and not is_fused_experts(module)
        for stack, weight in module.named_parameters(recurse=False)
        if len(logical_shape(weight)) == 3
    ]


def expert_stacks(model: nn.Module, readers: dict[str, str], skip_modules: list[str] | None) -> set[str]:
    """Names of the stacks to pack: all of `readers` but those that `skip_modules` names by transformers' rules, by
    themselves, by their module or by a parent of it, and those in one matrix whose rows are not whole blocks."""
    return {
        name
        for name, reader in readers.items()
        if all(should_convert_module(part, skip_modules) for part in (name, name.rpartition(".")[0], reader))
        and has_whole_blocks(logical_shape(model.get_parameter(name)))
    }


def has_whole_blocks(shape: Sequence[int]) -> bool:
    """Whether experts of this shape can be packed: stacks are filled up to whole blocks, rows of one matrix are not."""
    return len(shape) == 3 or bool(linear_block_size(shape[-1], BLOCK_SIZE))


def expert_linears(layers: list[MoELayer], skip_modules: list[str] | None) -> set[str]:
    """Names of the linear layers to pack of experts that are modules of their own: all but those that `skip_modules`
    names, by themselves or by a module of theirs, and those whose rows are not whole blocks."""
    return {
        name
        for layer in layers
        for name, module in _linears_of(layer)
        if linear_block_size(module.in_features, BLOCK_SIZE)
        and all(
            should_convert_module(part, skip_modules)
            for part in accumulate(name.split("."), "{}.{}".format)
            if part.startswith(layer.experts_name)
        )
    }


def _linears_of(layer: MoELayer) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that a layer's experts are made of."""
    for name, module in layer.experts.named_modules() if layer.kind == "modules" else ():
        if type(module) is nn.Linear:
            yield f"{layer.experts_name}.{name}", module


def skips_nothing(model: nn.Module, skip_modules: list[str] | None) -> list[str]:
    """Those of `skip_modules` that name no module and no parameter of `model`."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return [skip for skip in skip_modules or [] if all(should_convert_module(name, [skip]) for name in names)]


def packable_layers(model: nn.Module, skip_modules: list[str] | None) -> list[MoELayer]:
    """The MoE layers of `model`, all of whose experts can be run packed.

    Raises:
        [`OrdMoEModelError`]: there are none; or a module, not named by `skip_modules`, holds experts that are none of a
            layer's weights or linear layers, so that they would stay unquantised.
    """
    layers = MoEModel.of(model).all_layers
    stacks = stack_readers(layers)
    held = tuple(f"{layer.experts_name}." for layer in layers if layer.kind == "modules")
    for name, module in model.named_modules():
        has_matrix = any(
            parameter.dim() > 1 and f"{name}.{own}" not in stacks
            for own, parameter in module.named_parameters(recurse=False)
        )
        is_of_experts = name.startswith(held) or "Expert" in type(module).__name__
        is_read = type(module) is nn.Linear or is_fused_experts(module)
        if has_matrix and is_of_experts and not is_read and should_convert_module(name, skip_modules):
            raise OrdMoEModelError(
                f"{name} ({type(module).__name__}) cannot be packed in 4 bits: its experts' weights are neither stacks "
                "beside a router nor linear layers. Name the module in `llm_int8_skip_modules` to leave it as it is."
            )
    return layers


def linear_block_size(in_features: int, largest: int) -> int:
    """The largest block up to `largest` that divides a row; 0 where none does.

    bitsandbytes' CPU kernel unpacks rows that are not whole blocks wrongly (0.50.2).
    """
    size = largest
    while size >= BLOCK_SIZE and in_features % size:
        size //= 2
    return size if size >= BLOCK_SIZE else 0


def unquantised_linears(model: nn.Module, layers: list[MoELayer], skip_modules: list[str] | None) -> list[str]:
    """Names of the linear layers that stay as they are: all outside the decoder stacks that hold MoE layers (heads,
    vision towers, projectors), routers, gates with one output, and layers whose rows are not whole blocks; of experts,
    all but [`expert_linears`]."""
    of_experts = {name for layer in layers for name, _ in _linears_of(layer)}
    kept_experts = of_experts - expert_linears(layers, skip_modules)
    decoders = tuple(f"{layer.decoder_layers_name}." for layer in layers)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (
            not name.startswith(decoders)
            or name in kept_experts
            or module.out_features == 1
            or not linear_block_size(module.in_features, BLOCK_SIZE)
            or any(is_of_router(name, module, layer) for layer in layers)
        )
    ]


def is_of_router(name: str, module: nn.Module, layer: MoELayer) -> bool:
    """Whether the module `name` of `layer`'s block routes: it is in the router, or bears a router's name or shape."""
    is_in_experts = layer.experts_name != layer.block_name and name.startswith(f"{layer.experts_name}.")
    if is_in_experts or not name.startswith(f"{layer.block_name}."):
        return False
    if layer.router_name and f"{name}.".startswith(f"{layer.router_name}."):
        return True
    names_within = name.removeprefix(f"{layer.block_name}.").split(".")
    return not ROUTER_NAMES.isdisjoint(names_within) or getattr(module, "out_features", 0) == layer.num_experts
