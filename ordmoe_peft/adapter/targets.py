"""Which modules and parameters a role stands for in a model, and how many of them an adapter covers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import nn

from ..errors import OrdMoEModelError
from ..moe_model import MoELayer, MoEModel, module_of, without_wrappers
from ..quantization.storage import logical_shape


@dataclass(frozen=True)
class Target:
    """Something that LoRA can be put on.

    Args:
        role (`str`): one of [`~ordmoe_peft.adapter.config.ROLES`].
        kind (`str`): what it is within the role: `router`, `gate_up`, `up`, `down`, `shared_experts`, `attention`.
        name (`str`): full name in the unwrapped model.
        is_parameter (`bool`): goes to `target_parameters` rather than to `target_modules`.
        layer (`int`): place of its decoder layer.
        projection (`str`, defaults to `""`): of experts, which projection it is or is a part of, whatever its name:
            `gate_up` reads the hidden states for a gated activation, in one matrix or in two, `up` for one without a
            gate, `down` writes them. Empty where the shapes do not say.
    """

    role: str
    kind: str
    name: str
    is_parameter: bool
    layer: int
    projection: str = ""

    def is_meant_by(self, wish: str) -> bool:
        """Whether `wish` names its role, or its projection as `experts.down`."""
        role, _, projection = wish.partition(".")
        return self.role == role and projection in ("", self.projection)


def find_targets(model: nn.Module) -> list[Target]:
    """All targets of all roles in `model`, wrapped by PEFT or not."""
    moe, found = MoEModel.of(model), []
    for layer in moe.layers:
        if layer.router is not None:
            # A subclass of a linear layer that routes has another forward, which PEFT's linear layer does not call.
            is_parameter = type(layer.router_matrix_owner) is not nn.Linear
            name = f"{layer.router_name}.{layer.router_matrix}"
            name = name if is_parameter else name.removesuffix(".weight")
            found.append(Target("router", "router", name, is_parameter, layer.decoder_layer))
        found += _expert_targets(layer)
        for name, is_parameter in _linears(model, layer.block_name, "shared"):
            found.append(Target("shared_experts", "shared_experts", name, is_parameter, layer.decoder_layer))
    for index, decoder_layer in moe.decoder_layers:
        for name, is_parameter in _linears(model, decoder_layer, "attn", "attention"):
            found.append(Target("attention", "attention", name, is_parameter, index))
    return found


def _expert_targets(layer: MoELayer) -> list[Target]:
    """The stacks of a layer's experts, or the linear layers of experts that are modules; nothing of flat stacks, on
    which LoRA would be one for all experts."""
    if layer.kind == "modules":
        projections = _projections_of_linears(layer)
        kinds = {name: name.rpartition(".")[2] for name in projections}
    else:
        projections = _projections_of_stacks(layer) if layer.kind != "flat" else {}
        kinds = {name: _kind_of(name) for name in projections}
    return [
        Target(
            *("experts", kinds[name], f"{layer.experts_name}.{name}", layer.kind != "modules", layer.decoder_layer),
            projection,
        )
        for name, projection in projections.items()
    ]


def _projections_of_linears(layer: MoELayer) -> dict[str, str]:
    """Linear layers in experts that are modules → `Target.projection`, by which side is as wide as hidden states."""
    linears = {name: module_of(layer.experts, name) for name in linears_in(layer.experts)}
    width = layer.router_weight.shape[1] if layer.router is not None else None
    is_down = {name: part.out_features == width for name, part in linears.items()}
    is_told = all(is_down[name] != (part.in_features == width) for name, part in linears.items())
    up = sum(part.out_features for name, part in linears.items() if not is_down[name])
    down = sum(part.in_features for name, part in linears.items() if is_down[name])
    return {name: _projection(is_down[name], has_gate=up > down) if is_told else "" for name in linears}


def _projections_of_stacks(layer: MoELayer) -> dict[str, str]:
    """Stacks → `Target.projection`. Of two that are no class of transformers' experts interface, the larger is the
    gate's and the up-projection's, and of two alike the first reads; of more, the one that no other is like writes."""
    shapes = {name: tuple(logical_shape(stack)[1:]) for name, stack in layer.stacks.items()}
    names, sizes = list(shapes), [rows * columns for rows, columns in shapes.values()]
    if layer.kind == "fused":
        downs, has_gate = names[1:], layer.experts.has_gate
    elif len(names) == 2:
        downs, has_gate = [names[0] if sizes[0] < sizes[1] else names[1]], sizes[0] != sizes[1]
    else:
        downs, has_gate = [name for name in names if list(shapes.values()).count(shapes[name]) == 1], True
    return {name: _projection(name in downs, has_gate) if len(downs) == 1 < len(names) else "" for name in names}


def _projection(is_down: bool, has_gate: bool) -> str:
    return "down" if is_down else "gate_up" if has_gate else "up"


def _kind_of(projection: str) -> str:
    return projection.removesuffix(".weight").removesuffix("_proj")


def linears_in(module: nn.Module) -> list[str]:
    """Names of the linear layers in `module` with more than one output, without PEFT's wrappers."""
    return [
        without_wrappers(name)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and "lora_" not in name and part.out_features > 1
    ]


def matrices_beside_linears(experts: nn.Module) -> list[str]:
    """Names of the matrices in `experts` that are of no linear layer, or of one with a forward of its own."""
    plain = (nn.Linear.forward, Linear4bit.forward)
    linears = {
        name
        for name, part in experts.named_modules()
        if isinstance(part, nn.Linear) and ("lora_" in name or type(part).forward in plain)
    }
    return [
        without_wrappers(name)
        for name, weight in experts.named_parameters()
        if len(logical_shape(weight)) > 1 and name.rpartition(".")[0] not in linears
    ]


def _linears(model: nn.Module, parent_name: str, *words: str) -> Iterator[tuple[str, bool]]:
    """The linear layers with more than one output in the children of `parent_name` named by one of `words`.

    Each as its name, or its weight's where LoRA has to be on that, and whether it is the weight's.
    """
    for child_name, child in model.get_submodule(parent_name).named_children():
        if not any(word in child_name for word in words):
            continue
        for linear in linears_in(child):
            name = without_wrappers(f"{parent_name}.{child_name}.{linear}").removesuffix(".")
            # A model's own subclass may have another forward (DeepSeek-V4's grouped one), which PEFT's does not call.
            is_own = type(module_of(model, name)).__module__.startswith("transformers.models.")
            yield (f"{name}.weight", True) if is_own else (name, False)


def resolve_targets(model: nn.Module, wishes: list[str]) -> list[Target]:
    """The targets that `wishes` name: roles, or projections of experts as `experts.down`.

    Raises:
        [`OrdMoEModelError`]: one matches nothing, or only part of the layers that should have it.
    """
    moe, found = MoEModel.of(model), find_targets(model)
    moe_layers = {layer.decoder_layer for layer in moe.layers}
    decoder_layers = {index for index, _ in moe.decoder_layers}
    for wish in wishes:
        role = wish.partition(".")[0]
        covered = {target.layer for target in found if target.is_meant_by(wish)}
        if not covered:
            raise OrdMoEModelError(f"targets has {wish!r}, but {_why_nothing(wish, model, found)}")
        missing = sorted((decoder_layers if role == "attention" else moe_layers) - covered)
        if missing:
            raise OrdMoEModelError(
                f"targets has {wish!r}, but it was found in {len(covered)} layers only; nothing in the decoder layers "
                f"{missing}. Drop the role, or name the modules in a plain LoraConfig."
            )
    return [target for target in found if any(target.is_meant_by(wish) for wish in wishes)]


def _why_nothing(wish: str, model: nn.Module, found: list[Target]) -> str:
    """Why none of the targets that were `found` is meant by `wish`, and what to do."""
    role, layer, name = wish.partition(".")[0], MoEModel.of(model).layers[0], type(model).__name__
    if role == "experts" and layer.kind == "flat":
        return (
            f"{layer.experts_name} ({type(layer.experts).__name__}) holds the matrices of all experts in one, as "
            f"{', '.join(layer.projections)}, where LoRA would be one for all experts. Leave {wish!r} out of targets."
        )
    parts = {target.projection for target in found if target.role == role} if wish != role else set()
    if not parts:
        return f"{name} has nothing of that role. It has {sorted({target.role for target in found})}."
    if parts == {""}:
        return f"which projection is which, the shapes of the experts of {name} do not say. Adapt 'experts'."
    return f"the experts of {name} have {sorted(f'{role}.{part}' for part in parts)}. Name one of these, or 'experts'."


def base_quantization(model: nn.Module) -> dict | None:
    """How `model` is quantised, as plain data."""
    recipe: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    return recipe.to_dict() if hasattr(recipe, "to_dict") else recipe


def base_moe(model: nn.Module) -> dict:
    """The sizes that an adapter of `model` depends on, as plain data."""
    layers = MoEModel.of(model).layers
    hidden_size, expert_width = _sides(layers[0])
    return {
        "moe_layers": len(layers),
        "num_experts": layers[0].num_experts,
        "top_k": layers[0].top_k,
        "hidden_size": hidden_size,
        "expert_width": expert_width,
        "experts_class": type(layers[0].experts).__name__,
    }


def _sides(layer: MoELayer) -> tuple[int, int]:
    """The hidden size and the width of a layer's experts, from their last matrix, which is the down-projection."""
    if layer.kind == "modules":
        matrices = [logical_shape(weight) for name, weight in layer.experts.named_parameters() if "lora_" not in name]
        rows, columns = [shape for shape in matrices if len(shape) == 2][-1]
        return rows, columns
    *_, rows, columns = logical_shape(list(layer.stacks.values())[-1])
    if layer.kind == "flat":
        return columns, rows // layer.num_experts
    is_transposed = layer.experts.is_transposed if layer.kind == "fused" else columns == layer.router_weight.shape[1]
    return (columns, rows) if is_transposed else (rows, columns)


@dataclass(frozen=True)
class Coverage:
    """How much of a model an adapter covers; prints as a table.

    Args:
        rows (`list` of `(kind, found, adapted, trainable parameters)`): one row per kind of target.
    """

    rows: list[tuple[str, int, int, int]]

    def __str__(self) -> str:
        lines = [f"{'target':<16}{'found':>8}{'adapted':>9}{'trainable parameters':>22}"]
        lines += [f"{kind:<16}{found:>8}{adapted:>9}{count:>22,}" for kind, found, adapted, count in self.rows]
        return "\n".join(lines)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers in `model`, each with the name of what it adapts, a module or a parameter."""
    for wrapped_name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            parameter_name = getattr(module, "parameter_name", None)
            yield without_wrappers(wrapped_name) + (f".{parameter_name}" if parameter_name else ""), module


def coverage_report(model: nn.Module) -> Coverage:
    """Count, by kind, the targets that `model` has, those that LoRA is on, and their trainable parameters.

    Args:
        model (`nn.Module`): a [`~peft.PeftModel`] or any MoE model.
    """
    trainable: dict[str, int] = {}
    adapted: set[str] = set()
    for name, module in adapted_modules(model):
        adapted.add(name)
        factors = [*module.lora_A.parameters(), *module.lora_B.parameters()]
        trainable[name] = sum(factor.numel() for factor in factors if factor.requires_grad)
    rows = []
    found = find_targets(model)
    for kind in dict.fromkeys(target.kind for target in found):
        names = [target.name for target in found if target.kind == kind]
        rows.append(
            (
                kind,
                len(names),
                sum(name in adapted for name in names),
                sum(trainable.get(name, 0) for name in names),
            )
        )
    return Coverage(rows)
