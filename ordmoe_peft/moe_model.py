"""What the method knows of a model: its MoE layers, and the text models that run them.

`layer_search.py` finds the layers. Modules that PEFT has wrapped are seen through.
"""

import re
import weakref
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from .errors import OrdMoEModelError
from .layer_search import FoundLayer, find_layers, is_fused_experts, stated_top_k, without_wrappers


__all__ = ["EXPERTS_IMPLEMENTATION", "MoELayer", "MoEModel", "is_fused_experts", "unwrapped", "without_wrappers"]

# Name of our experts function in transformers' registry.
EXPERTS_IMPLEMENTATION = "ordmoe"
# Blocks that are known to have no ranks of experts, by class.
NO_LAYERS = {
    "DogeCDMoE": "chooses experts by the product of two halves of a key, and its experts are rows of an embedding, not "
    "matrices: neither tiers nor LoRA nor 4 bits apply",
}


@dataclass(frozen=True)
class MoELayer:
    """A router and its routed experts within one decoder layer.

    Args:
        index (`int`): place among the model's MoE layers, from 0.
        block (`nn.Module`), block_name (`str`): the module that holds router and experts, without PEFT's wrappers.
        decoder_layers_name (`str`): name of the `nn.ModuleList` of decoder layers.
        decoder_layer (`int`): place of the decoder layer in that list.
        kind (`str`): how the experts are held: `"fused"`, `"stacks"`, `"flat"` or `"modules"`
            ([`layer_search`](layer_search.py)).
        num_experts (`int`): E.
        experts (`nn.Module`), experts_name (`str`): the block's child that holds the experts; the block itself where
            several do.
        projections (`tuple[str, ...]`): the experts' own parameters, by their names within `experts`: up-projection
            (with the gate where there is one) and down-projection of fused experts; none of `"modules"`.
        router (`nn.Module`), router_name (`str`): the router, `None` and `""` where there is none of a known kind.
        router_matrix (`str`): name of the matrix within it that gives the scores.
    """

    index: int
    block: nn.Module = field(repr=False)
    block_name: str
    decoder_layers_name: str
    decoder_layer: int
    kind: str
    num_experts: int
    experts: nn.Module = field(repr=False)
    experts_name: str
    projections: tuple[str, ...]
    router: nn.Module | None = field(repr=False)
    router_name: str
    router_matrix: str

    @property
    def known_router(self) -> nn.Module:
        """The router.

        Raises:
            [`OrdMoEModelError`]: there is none of a known kind.
        """
        if self.router is None:
            raise OrdMoEModelError(
                f"{self.block_name} has experts but no router that has one row of weights per expert, or several that "
                "might be it; its tiers are unknown."
            )
        return self.router

    @property
    def router_weight(self) -> nn.Parameter:
        """The router's matrix: a row for each expert, perhaps some for what else it chooses (`nn.Parameter`)."""
        return parameter_of(self.known_router, self.router_matrix)

    @property
    def router_matrix_owner(self) -> nn.Module:
        """The module that has the router's matrix: the router itself, or a part of it."""
        return module_of(self.known_router, self.router_matrix.rpartition(".")[0])

    @property
    def num_scores(self) -> int:
        """Rows of the router's matrix: E, or more where it scores what are no experts of their own, too."""
        return self.router_weight.shape[0]

    @property
    def top_k(self) -> int:
        """K, the experts per token; 0 where neither the router nor its block says so."""
        return stated_top_k(self.router, self.block)

    @property
    def stacks(self) -> dict[str, nn.Parameter]:
        """The parameters that `projections` names."""
        return {name: parameter_of(self.experts, name) for name in self.projections}


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module under PEFT's wrappers."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def module_of(module: nn.Module, name: str) -> nn.Module:
    """What `module` has by this name, under PEFT's wrappers; `module` itself by none."""
    for part in filter(None, name.split(".")):
        module = unwrapped(getattr(module, part))
    return module


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that `module` has by this name, under PEFT's wrappers."""
    owner, _, attribute = name.rpartition(".")
    return getattr(module_of(module, owner), attribute)


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
        layers (`list` of [`MoELayer`]): the MoE layers of what takes text, in order. Those of a vision tower or a
            talker are left alone, unless that part is given by itself as `model`.
        all_layers (`list` of [`MoELayer`]): these and those that are left alone.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        # By these a view that is out of date is known. Experts and routers keep theirs as long as the view holds them.
        self._module_ids = _module_ids(model)
        self.all_layers = _find_layers(model)
        text = [layer for layer in self.all_layers if _takes_text(model, layer)] or self.all_layers
        self.layers = [replace(layer, index=index) for index, layer in enumerate(text)]

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
            name = layer.decoder_layers_name.rpartition(".")[0]
            while name and isinstance(self.model.get_submodule(name), (nn.ModuleList, nn.ModuleDict)):
                name = name.rpartition(".")[0]  # a container, which nobody calls
            found.setdefault(self.model.get_submodule(name), []).append(layer)
        return found

    @cached_property
    def decoder_layers(self) -> list[tuple[int, str]]:
        """Place and name of each decoder layer of the text models, with a MoE or without."""
        lists = dict.fromkeys(layer.decoder_layers_name for layer in self.layers)
        return [(index, f"{name}.{index}") for name in lists for index in range(len(self.model.get_submodule(name)))]

    def check_fused(self, wish: str) -> None:
        """Raise [`OrdMoEModelError`] if `wish` meets experts that are not of transformers' experts interface."""
        other = next((layer for layer in self.layers if layer.kind != "fused"), None)
        if other is not None:
            raise OrdMoEModelError(
                f"{wish} knows fused experts of transformers' experts interface alone, and {other.experts_name} "
                f"({type(other.experts).__name__}) holds its experts in another way."
            )


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
    layers = [_layer(model, index, found) for index, found in enumerate(find_layers(model))]
    if not layers:
        known = (
            f"{without_wrappers(name)} ({type(module).__name__}) {NO_LAYERS[type(module).__name__]}"
            for name, module in model.named_modules()
            if type(module).__name__ in NO_LAYERS
        )
        reason = "OrdMoE works on models with routed experts, such as Qwen3-MoE, Qwen3-VL-MoE, OLMoE or Mixtral"
        raise OrdMoEModelError(next(known, f"{type(model).__name__} has no MoE layers: {reason}") + ".")
    return layers


def _layer(model: nn.Module, index: int, found: FoundLayer) -> MoELayer:
    place = re.match(r"(?P<list>.*?)\.(?P<index>\d+)\.", f"{found.block}.")
    assert place is not None, "layers are searched for within lists alone"
    block = module_of(model, found.block)
    router = module_of(model, found.router) if found.router else None
    return MoELayer(
        index=index,
        block=block,
        block_name=found.block,
        decoder_layers_name=place["list"],
        decoder_layer=int(place["index"]),
        kind=found.kind,
        num_experts=found.num_experts,
        experts=module_of(model, found.experts),
        experts_name=found.experts,
        projections=found.stacks,
        router=router,
        router_name=found.router,
        router_matrix=found.router_matrix,
    )


def _takes_text(model: nn.Module, layer: MoELayer) -> bool:
    """Whether the model that runs a layer takes text: vision towers and talkers take images or sounds alone."""
    name = layer.decoder_layers_name
    while name:
        name = name.rpartition(".")[0]
        owner = module_of(model, name)
        if isinstance(owner, PreTrainedModel):
            modalities = owner.input_modalities
            return "text" in ([modalities] if isinstance(modalities, str) else modalities)
    return True
