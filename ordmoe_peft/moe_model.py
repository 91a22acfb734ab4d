"""What the method knows of a model: its MoE layers, the text models that run them, and what it cannot serve.

Layers are found by what they are, not by what they are called: transformers marks every class of fused experts with
flags (`has_gate`, `is_transposed`, …; `transformers/integrations/moe.py`), and a router is the sibling that has one
row of weights per expert. Modules that PEFT has wrapped are seen through.
"""

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    """

    index: int
    block_name: str
    decoder_layers_name: str
    decoder_layer: int
    experts: nn.Module = field(repr=False)
    experts_name: str
    router: nn.Module | None = field(repr=False)
    router_name: str

    @property
    def known_router(self) -> nn.Module:
        """The router.

        Raises:
            [`OrdMoEModelError`]: there is none of a known kind.
        """
        if self.router is None:
            raise OrdMoEModelError(
                f"{self.block_name} has experts but no router that has one row of weights per expert; its tiers are "
                "unknown."
            )
        return self.router

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def top_k(self) -> int:
        """K, the experts per token; 0 where the router does not say."""
        return getattr(self.router, "top_k", 0)

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


class MoEModel:
    """A model's MoE layers. `MoEModel.of(model)` builds it once, and anew when modules have come or gone.

    It does not keep its model alive.

    Attributes:
        layers (`list` of [`MoELayer`]): the MoE layers, in order.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        # By these a view that is out of date is known. Experts and routers keep theirs as long as the view holds them.
        self._module_ids = _module_ids(model)
        self.layers = _find_layers(model)

    @classmethod
    def of(cls, model: nn.Module) -> "MoEModel":
        """The view of `model`, wrapped by PEFT or not, or of a part of one.

        Raises:
            [`OrdMoEModelError`]: it has no MoE layers.
        """
        view = _views.get(model)
        if view is None or view._module_ids != _module_ids(model):
            view = _views[model] = cls(model)
        return view

    @property
    def model(self) -> nn.Module:
        """The model that this is a view of."""
        model = self._model()
        assert model is not None, "who asks for the view of a model holds the model"
        return model

    @property
    def text_models(self) -> dict[nn.Module, list[MoELayer]]:
        """The modules that run the decoder layers, the owners of their `nn.ModuleList`s, and the MoE layers of each.

        Most models have one; the full Qwen3-Omni has two, a thinker and a talker.
        """
        found: dict[nn.Module, list[MoELayer]] = {}
        for layer in self.layers:
            owner = self.model.get_submodule(layer.decoder_layers_name.rpartition(".")[0])
            found.setdefault(owner, []).append(layer)
        return found

    @cached_property
    def decoder_layers(self) -> list[tuple[int, str]]:
        """Place and name of each decoder layer of the text models, with a MoE or without."""
        lists = dict.fromkeys(layer.decoder_layers_name for layer in self.layers)
        return [(index, f"{name}.{index}") for name in lists for index in range(len(self.model.get_submodule(name)))]

    @cached_property
    def unserved_blocks(self) -> list[str]:
        """Names of the blocks that route among experts which are not of transformers' experts interface.

        Such experts are modules of one class in a list, or stacks of matrices in a class without the interface's
        flags. Beside them is a router: a matrix with a row for each expert, as wide as the experts' input.
        """
        modules = {without_wrappers(name): part for name, part in self.model.named_modules() if "lora_" not in name}
        blocks = [
            _block_of(name, modules)
            for name, part in modules.items()
            if re.fullmatch(r".*\.\d+\..*", name) and not is_fused_experts(part)
        ]
        return list(dict.fromkeys(block for block in blocks if block))

    def check_all_served(self, wish: str) -> None:
        """Raise [`OrdMoEModelError`] if MoE blocks would be left out of `wish`."""
        blocks = self.unserved_blocks
        if blocks:
            raise OrdMoEModelError(
                f"{wish} cannot cover all MoE layers of {type(unwrapped(self.model)).__name__}: in "
                f"{_shortened(blocks)} the experts are not of transformers' experts interface (fused, with "
                "`use_experts_implementation`). Load the model with transformers' own class for its architecture, if "
                "there is one; else adapt `attention` alone, with `layer_scope` a list of the layers that are found."
            )

    def check_scope_is_served(self, layer_scope: str | Sequence[int]) -> None:
        """Raise [`OrdMoEModelError`] if `layer_scope` counts MoE layers of which some cannot be held to tiers.

        A list of indices means those that are found.
        """
        if isinstance(layer_scope, str):
            self.check_all_served(f"layer_scope={layer_scope!r}")


# Views that were built; an entry goes with its model.
_views: "weakref.WeakKeyDictionary[nn.Module, MoEModel]" = weakref.WeakKeyDictionary()


def _module_ids(model: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, model.modules()))


def _find_layers(model: nn.Module) -> list[MoELayer]:
    if any(hasattr(weight, "ds_shape") for weight in model.parameters()):
        raise OrdMoEModelError(
            f"The weights of {type(model).__name__} were shared out by DeepSpeed ZeRO-3 as it was loaded, and are "
            "empty here: load it in 4 bits, which transformers loads whole, or share it out by FSDP2."
        )
    layers: list[MoELayer] = []
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
    """Whether `block` has, beside `experts`, a matrix with a row or a column for each expert, whose other side is as
    long as a side of the experts' matrices. That side is the longer one, since a square matrix routes nothing."""
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
