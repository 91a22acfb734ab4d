"""One view of a MoE layer in any model: its experts, its router, its sizes.

Layers are found by what they are, not by what they are called: transformers marks every class of fused experts with
flags (`has_gate`, `is_transposed`, …; `transformers/integrations/moe.py`), and a router is the sibling that has one
row of weights per expert. Modules that PEFT has wrapped are seen through.
"""

import re
from dataclasses import dataclass, field

from torch import nn

from .errors import OrdMoEModelError


# Name of our experts function in transformers' registry.
EXPERTS_IMPLEMENTATION = "ordmoe"


@dataclass(frozen=True)
class MoELayer:
    """A router and its routed experts within one decoder layer.

    Args:
        index (`int`): place among the model's MoE layers, from 0.
        block_name (`str`): name of the module that holds router and experts, without PEFT's wrappers.
        decoder_layers_name (`str`): name of the `nn.ModuleList` of decoder layers.
        decoder_layer (`int`): place of the decoder layer in that list.
        experts (`nn.Module`), experts_name (`str`): the fused experts.
        router (`nn.Module`), router_name (`str`): the router, `None` and `""` where there is none of a known kind.
        top_k (`int`): K, the experts per token; 0 where the router does not say.
    """

    index: int
    block_name: str
    decoder_layers_name: str
    decoder_layer: int
    experts: nn.Module = field(repr=False)
    experts_name: str
    router: nn.Module | None = field(repr=False)
    router_name: str
    top_k: int

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the fused stacks: up-projection (with the gate where there is one) and down-projection."""
        return ("gate_up_proj" if self.experts.has_gate else "up_proj", "down_proj")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` is of a class that transformers' experts interface serves."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "num_experts"))


def without_wrappers(name: str) -> str:
    """The name that a module has in the model before PEFT wraps it."""
    return name.replace(".base_layer", "")


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module under PEFT's wrappers."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def check_no_adapter(model: nn.Module, action: str) -> None:
    """Raise [`OrdMoEModelError`] if PEFT has wrapped a layer of `model`, which `action` cannot see through."""
    wrapped = next((name for name, _ in model.named_modules() if without_wrappers(name) != name), None)
    if wrapped is not None:
        raise OrdMoEModelError(
            f"{type(model).__name__} has an adapter, on {without_wrappers(wrapped)} first: take it off with "
            f"`model = peft_model.unload()` to {action}, and load it again afterwards."
        )


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """All MoE layers of `model`, in order.

    Raises:
        [`OrdMoEModelError`]: there is none.
    """
    layers = []
    for wrapped_name, module in model.named_modules():
        name = without_wrappers(wrapped_name)
        place = re.fullmatch(r"(?P<list>.*)\.(?P<index>\d+)\..*", name)
        if not is_fused_experts(module) or place is None:
            continue
        block_name = name.rpartition(".")[0]
        router_name, router = _find_router(model.get_submodule(block_name), module.num_experts)
        layers.append(
            MoELayer(
                index=len(layers),
                block_name=block_name,
                decoder_layers_name=place["list"],
                decoder_layer=int(place["index"]),
                experts=module,
                experts_name=name,
                router=router,
                router_name=f"{block_name}.{router_name}" if router is not None else "",
                top_k=getattr(router, "top_k", 0),
            )
        )
    if not layers:
        raise OrdMoEModelError(
            f"{type(model).__name__} has no MoE layers: OrdMoE works on models with fused routed experts, such as "
            "Qwen3-MoE, Qwen3-VL-MoE, OLMoE or Mixtral."
        )
    return layers


def _find_router(block: nn.Module, num_experts: int) -> tuple[str, nn.Module | None]:
    for name, child in block.named_children():
        router = unwrapped(child)
        weight = getattr(router, "weight", None)
        if not is_fused_experts(router) and weight is not None and weight.dim() == 2 and len(weight) == num_experts:
            return name, router
    return "", None


def text_models(model: nn.Module, layers: list[MoELayer]) -> dict[nn.Module, list[MoELayer]]:
    """The modules that run the decoder layers, the owners of their `nn.ModuleList`s, and the MoE layers of each.

    Most models have one; the full Qwen3-Omni has two, a thinker and a talker.
    """
    found: dict[nn.Module, list[MoELayer]] = {}
    for layer in layers:
        owner = model.get_submodule(layer.decoder_layers_name.rpartition(".")[0])
        found.setdefault(owner, []).append(layer)
    return found
