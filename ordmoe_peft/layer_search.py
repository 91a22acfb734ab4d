"""Find experts and the routers that choose among them, by what modules hold and not by what they are called.

    block ─┬ router    has, itself or in a child, a matrix with a row for each expert, perhaps with rows for more
           └ experts   "fused":   a class of transformers' experts interface, which marks it with flags
                       "stacks":  parameters (E, ·, ·) in any other class
                       "flat":    parameters (E · F, H) in a class that says how many experts it has
                       "modules": a list or dictionary of E modules of one class

All is read off names and shapes, so modules that PEFT has wrapped are seen through, and weights may be on any device.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


# What routers, their configurations and their blocks call K.
NAMES_OF_K = (
    *("top_k", "num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "top_k_experts"),
    *("moe_top_k", "moe_topk", "moe_k"),
)
# Routers that say it in their names alone.
K_OF_ROUTERS = {"SwitchTransformersTop1Router": 1, "NllbMoeTop2Router": 2}
NAMES_OF_E = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
# Modules between a block and what holds its experts, at most.
MAX_DEPTH = 2


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` is of a class that transformers' experts interface serves."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "num_experts"))


def without_wrappers(name: str) -> str:
    """The name that a module has in the model before PEFT wraps it."""
    return name.replace(".base_layer", "")


@dataclass(frozen=True)
class FoundExperts:
    """Experts that a module holds.

    Args:
        name (`str`): the module.
        kind (`str`): see above.
        num_experts (`int`): E.
        stacks (`tuple[str, ...]`): names of the experts' own parameters; none of `"modules"`.
        widths (`frozenset[int]`): the sides of the experts' matrices.
    """

    name: str
    kind: str
    num_experts: int
    stacks: tuple[str, ...] = ()
    widths: frozenset[int] = frozenset()


@dataclass(frozen=True)
class FoundLayer:
    """A block's experts and its router.

    Args:
        block (`str`): the module that holds both.
        experts (`str`): the block's child that holds the experts; the block itself where several do.
        kind (`str`), num_experts (`int`): of the experts.
        stacks (`tuple[str, ...]`): names of the experts' own parameters, within `experts`.
        router (`str`): the router, a child of the block; `""` where there is none.
        router_matrix (`str`): name of the router's matrix within it.
    """

    block: str
    experts: str
    kind: str
    num_experts: int
    stacks: tuple[str, ...]
    router: str
    router_matrix: str


def find_layers(model: nn.Module) -> Iterator[FoundLayer]:
    """The MoE layers of `model`, wrapped by PEFT or not, in the order of its modules."""
    tree = _Tree(model)
    by_block: dict[str, list[FoundExperts]] = {}
    for name in tree.modules:
        experts = tree.experts_in(name) if is_within_list(f"{name}.") else None
        block = None if experts is None else tree.block_of(experts)
        if experts is not None and block is not None:
            by_block.setdefault(block, []).append(experts)
    for block, found in by_block.items():
        yield from tree.layers_in(block, found)


def is_within_list(name: str) -> bool:
    """Whether a module of this name is in an `nn.ModuleList`, as all is that a decoder layer holds."""
    return re.search(r"\.\d+\.", name) is not None


def stated_top_k(*owners: nn.Module | None) -> int:
    """K as the first of `owners` or of their configurations says it; 0 if none does."""
    named = (K_OF_ROUTERS[type(owner).__name__] for owner in owners if type(owner).__name__ in K_OF_ROUTERS)
    stated = (
        value
        for owner in owners
        for holder in (owner, getattr(owner, "config", None))
        for name in NAMES_OF_K
        if type(value := getattr(holder, name, None)) is int
    )
    return next(named, next(stated, 0))


def _states_top_k(module: nn.Module) -> bool:
    return any(type(getattr(module, name, None)) is int for name in NAMES_OF_K)


class _Tree:
    """Modules and matrices of a model by the names that they have without PEFT's wrappers."""

    def __init__(self, model: nn.Module):
        named = model.named_modules(remove_duplicate=False)  # what layers share has a name in each
        self.modules = {without_wrappers(name): part for name, part in named if "lora_" not in name}
        self.shapes = {
            without_wrappers(name): _shape(weight)
            for name, weight in model.named_parameters(remove_duplicate=False)
            if "lora_" not in name
        }
        self.children: dict[str, list[str]] = {}
        for name in self.modules:
            if name:
                self.children.setdefault(name.rpartition(".")[0], []).append(name)
        self.own: dict[str, list[str]] = {}
        for name in self.shapes:
            self.own.setdefault(name.rpartition(".")[0], []).append(name)
        # Both are asked for many times over, where each expert is a module.
        self._shapes_in: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
        self._experts_in: dict[str, FoundExperts | None] = {}

    def shapes_in(self, name: str, dim: int) -> dict[str, tuple[int, ...]]:
        """Parameters of `dim` dimensions in the module `name` and in all that it holds."""
        if (name, dim) not in self._shapes_in:
            inner = [part for child in self.children.get(name, ()) for part in self.shapes_in(child, dim).items()]
            self._shapes_in[name, dim] = {**self.own_shapes(name, dim), **dict(inner)}
        return self._shapes_in[name, dim]

    def own_shapes(self, name: str, dim: int) -> dict[str, tuple[int, ...]]:
        return {own: self.shapes[own] for own in self.own.get(name, ()) if len(self.shapes[own]) == dim}

    def experts_in(self, name: str) -> FoundExperts | None:
        """The experts that the module `name` itself holds, if it may hold such."""
        if name not in self._experts_in:
            self._experts_in[name] = self._look_into(name)
        return self._experts_in[name]

    def _look_into(self, name: str) -> FoundExperts | None:
        module = self.modules[name]
        if is_fused_experts(module):
            fused = tuple(f"{name}.{stack}" for stack in projections_of(module))
            return FoundExperts(name, "fused", module.num_experts, fused)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and (found := self._list_of_experts(name)):
            return found
        if stacks := self.own_shapes(name, 3):
            num_experts = max(shape[0] for shape in stacks.values())
            widths = frozenset(side for shape in stacks.values() for side in shape[1:])
            is_several = len(stacks) > 1 and len({shape[0] for shape in stacks.values()}) == 1
            if is_several or num_experts in self._stated_sizes(name):
                return FoundExperts(name, "stacks", num_experts, tuple(stacks), widths)
        return self._flat_experts_in(name)

    def _list_of_experts(self, name: str) -> FoundExperts | None:
        """Modules of one class with matrices, perhaps with some that compute nothing (identities)."""
        members = [child for child in self.children.get(name, ()) if not isinstance(self.modules[child], nn.Dropout)]
        experts = [child for child in members if self.shapes_in(child, 2)]
        if len(experts) < 2 or len({type(self.modules[child]) for child in experts}) > 1:
            return None
        widths = frozenset(side for shape in self.shapes_in(experts[0], 2).values() for side in shape)
        return FoundExperts(name, "modules", len(members), widths=widths)

    def _flat_experts_in(self, name: str) -> FoundExperts | None:
        flat, sizes = self.own_shapes(name, 2), self._stated_sizes(name)
        rows, *others = {shape[0] for shape in flat.values()} or {0}
        fitting = [size for size in sizes if 1 < size < rows and rows % size == 0]
        if len(flat) < 2 or others or not fitting:
            return None
        widths = frozenset(side for shape in flat.values() for side in (shape[1], rows // fitting[0]))
        return FoundExperts(name, "flat", fitting[0], tuple(flat), widths)

    def _stated_sizes(self, name: str) -> list[int]:
        """What the module says of its number of experts."""
        values = [getattr(self.modules[name], attribute, None) for attribute in (*NAMES_OF_E, "total_experts")]
        return [value for value in values if type(value) is int]

    def block_of(self, experts: FoundExperts) -> str | None:
        """The module that holds `experts` and the router, or in place of one what only a router has."""
        if experts.kind == "fused":
            return experts.name.rpartition(".")[0]
        block = experts.name.rpartition(".")[0] if experts.kind == "modules" else experts.name  # lists hold no router
        for _ in range(MAX_DEPTH + 1):
            routes = self.routers_in(block, [experts]) or self._routes_itself(block, experts)
            if routes and is_within_list(f"{block}."):
                return block
            block = block.rpartition(".")[0]
        return None

    def _routes_itself(self, block: str, experts: FoundExperts) -> bool:
        """Whether a matrix of the block itself, which holds the experts in another module, has a row or a column for
        each, and fits theirs."""
        return block != experts.name and any(
            min(shape) == experts.num_experts < max(shape) and max(shape) in experts.widths
            for shape in self.own_shapes(block, 2).values()
        )

    def layers_in(self, block: str, found: list[FoundExperts]) -> Iterator[FoundLayer]:
        """The block's layers: one for each module of fused experts, beside which stacks are shared experts (inkling);
        else one for all its experts, which several modules may hold (JetMoE's up- and down-projection)."""
        fused = [[experts] for experts in found if experts.kind == "fused"]
        for group in fused or [found]:
            children = {_child_of(block, experts.name) for experts in group}
            holder = children.pop() if len(children) == 1 else block
            is_in_lists = len(group) > 1 and group[0].kind == "modules"  # a list for each projection
            router, matrix = ("", "") if is_in_lists else self.router_of(block, group)
            stacks = tuple(stack.removeprefix(f"{holder}.") for experts in group for stack in experts.stacks)
            yield FoundLayer(block, holder, group[0].kind, group[0].num_experts, stacks, router, matrix)

    def router_of(self, block: str, group: list[FoundExperts]) -> tuple[str, str]:
        """The router in `block` and the name of its matrix within it; empty where there is none, or several alike."""
        found = self.routers_in(block, group)
        if not found or sum(rank == found[0][0] for rank, _, _ in found) > 1:
            return "", ""
        return found[0][1:]

    def routers_in(self, block: str, group: list[FoundExperts]) -> list[tuple[tuple, str, str]]:
        """What may be the router in `block`: rank, child, name of its matrix within that; the likeliest first.

        It is a child with a matrix of E rows, or of more if it says its K: inkling's rank shared experts, too, ZAYA's
        have one for skipping the layer.
        """
        held, found = {_child_of(block, experts.name) for experts in group}, []
        for child in self.children.get(block, ()):
            matrices = [] if child in held else self._matrices_of(child, group[0])
            if not matrices or self._holds_experts(child, group[0]):
                continue
            for matrix in matrices:
                is_other = self.shapes[matrix][0] != group[0].num_experts
                rank = (is_other, not _states_top_k(self.modules[child]), matrix.count("."))
                found.append((rank, child, matrix.removeprefix(f"{child}.")))
        return sorted(found)

    def _holds_experts(self, name: str, experts: FoundExperts) -> bool:
        """Whether the module `name` is or holds as many experts, so that it is a block or a list, and no router."""
        found = self.experts_in(name)
        if found is not None and found.num_experts == experts.num_experts:
            return True
        return any(self._holds_experts(child, experts) for child in self.children.get(name, ()))

    def _matrices_of(self, child: str, experts: FoundExperts) -> list[str]:
        """The matrices of a child that may route: those with the fewest rows from E on. Several make it unknown which
        one does (scores, and noise on them)."""
        shapes = self.shapes_in(child, 2)
        rows = {name: shape[0] for name, shape in shapes.items() if shape[0] >= experts.num_experts}
        fewest = [name for name in rows if rows[name] == min(rows.values())]
        is_exact = bool(rows) and min(rows.values()) == experts.num_experts
        if experts.kind != "fused":  # no flags say that these are experts: the matrix reads what they read, and is flat
            fits = [name for name in fewest if shapes[name][0] < shapes[name][1] and shapes[name][1] in experts.widths]
            return fits if is_exact else []
        is_alone = len(shapes) == 1 or any(name in self.own.get(child, ()) for name in fewest)
        return fewest if _states_top_k(self.modules[child]) or (is_alone and is_exact) else []


def projections_of(experts: nn.Module) -> tuple[str, str]:
    """The names of a fused class's stacks: up-projection (with the gate where there is one) and down-projection."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def _child_of(block: str, name: str) -> str:
    """The child of `block` that is or holds the module `name`; the block itself if that is it."""
    if name == block:
        return block
    first = name.removeprefix(f"{block}.").partition(".")[0]
    return f"{block}.{first}"


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    """The shape of the numbers that `weight` stands for, also where they are packed in 4 bits.

    [`~ordmoe_peft.quantization.storage.logical_shape`] is the same, in a package that imports this module.
    """
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)
