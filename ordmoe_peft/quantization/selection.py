"""What is packed in 4 bits and what never is, by name and shape alone."""

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import OrdMoEModelError
from ..moe_model import MoELayer, MoEModel, is_fused_experts
from .storage import BLOCK_SIZE


# What a module within a MoE block is called when its linear layers route.
ROUTER_NAMES = {"router", "gate"}


def expert_stacks(layers: list[MoELayer], skip_modules: list[str] | None) -> set[str]:
    """Names of the fused stacks to pack: all but those that `skip_modules` names by transformers' rules, by
    themselves, by their module or by a parent of it."""
    return {
        f"{layer.experts_name}.{projection}"
        for layer in layers
        for projection in layer.projections
        if should_convert_module(layer.experts_name, skip_modules)
        and should_convert_module(f"{layer.experts_name}.{projection}", skip_modules)
    }


def skips_nothing(model: nn.Module, skip_modules: list[str] | None) -> list[str]:
    """Those of `skip_modules` that name no module and no parameter of `model`."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return [skip for skip in skip_modules or [] if all(should_convert_module(name, [skip]) for name in names)]


def packable_layers(model: nn.Module, skip_modules: list[str] | None) -> list[MoELayer]:
    """The MoE layers of `model`, all of whose experts can be run packed.

    Raises:
        [`OrdMoEModelError`]: there are none; or a module, not named by `skip_modules`, holds experts but does not use
            transformers' experts interface, so that they would stay unquantised.
    """
    for name, module in model.named_modules():
        has_stack = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        is_unserved = "Expert" in type(module).__name__ and has_stack and not is_fused_experts(module)
        if is_unserved and should_convert_module(name, skip_modules):
            raise OrdMoEModelError(
                f"{name} ({type(module).__name__}) cannot be loaded in 4 bits: its class does not use transformers' "
                "experts interface. transformers' own `BitsAndBytesConfig` quantises the linear layers of such a model "
                "and leaves its experts in their dtype."
            )
    layers = MoEModel.of(model).all_layers
    for layer in layers:
        if layer.kind != "fused" and should_convert_module(layer.block_name, skip_modules):
            raise OrdMoEModelError(
                f"The experts in {layer.block_name} ({type(layer.block).__name__}) cannot be packed in 4 bits: they "
                "are not of transformers' experts interface. Name the module in `llm_int8_skip_modules` to leave it as "
                "it is."
            )
    return [layer for layer in layers if layer.kind == "fused"]


def linear_block_size(in_features: int, largest: int) -> int:
    """The largest block up to `largest` that divides a row; 0 where none does.

    bitsandbytes' CPU kernel unpacks rows that are not whole blocks wrongly (0.50.2).
    """
    size = largest
    while size >= BLOCK_SIZE and in_features % size:
        size //= 2
    return size if size >= BLOCK_SIZE else 0


def unquantised_linears(model: nn.Module, layers: list[MoELayer]) -> list[str]:
    """Names of the linear layers that stay as they are: all outside the decoder stacks that hold MoE layers (heads,
    vision towers, projectors), routers, gates with one output, and layers whose rows are not whole blocks."""
    decoders = tuple(f"{layer.decoder_layers_name}." for layer in layers)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (
            not name.startswith(decoders)
            or module.out_features == 1
            or not linear_block_size(module.in_features, BLOCK_SIZE)
            or any(is_of_router(name, module, layer) for layer in layers)
        )
    ]


def is_of_router(name: str, module: nn.Module, layer: MoELayer) -> bool:
    """Whether the module `name` of `layer`'s block routes: it is in the router, or bears a router's name or shape."""
    if not name.startswith(f"{layer.block_name}."):
        return False
    if layer.router_name and f"{name}.".startswith(f"{layer.router_name}."):
        return True
    names_within = name.removeprefix(f"{layer.block_name}.").split(".")
    return not ROUTER_NAMES.isdisjoint(names_within) or getattr(module, "out_features", 0) == layer.num_experts
