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
    """

    role: str
    kind: str
    name: str
    is_parameter: bool
    layer: int


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
        return [
            Target("experts", name.rpartition(".")[2], f"{layer.experts_name}.{name}", False, layer.decoder_layer)
            for name in linears_in(layer.experts)
        ]
    return [
        Target("experts", _kind_of(name), f"{layer.experts_name}.{name}", True, layer.decoder_layer)
        for name in (() if layer.kind == "flat" else layer.projections)
    ]


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


def resolve_targets(model: nn.Module, roles: list[str]) -> list[Target]:
    """The targets of `roles`.

    Raises:
        [`OrdMoEModelError`]: a role matches nothing, or only part of the layers that should have it.
    """
    moe, found = MoEModel.of(model), find_targets(model)
    moe_layers = {layer.decoder_layer for layer in moe.layers}
    decoder_layers = {index for index, _ in moe.decoder_layers}
    for role in roles:
        covered = {target.layer for target in found if target.role == role}
        if not covered:
            layer = moe.layers[0]
            if role == "experts" and layer.kind == "flat":
                raise OrdMoEModelError(
                    f"targets has 'experts', but {layer.experts_name} ({type(layer.experts).__name__}) holds the "
                    f"matrices of all experts in one, as {', '.join(layer.projections)}, where LoRA would be one for "
                    "all experts. Leave 'experts' out of targets."
                )
            available = sorted({target.role for target in found})
            raise OrdMoEModelError(
                f"targets has {role!r}, but {type(model).__name__} has nothing of that role. It has {available}."
            )
        missing = sorted((decoder_layers if role == "attention" else moe_layers) - covered)
        if missing:
            raise OrdMoEModelError(
                f"targets has {role!r}, but it was found in {len(covered)} layers only; nothing in the decoder layers "
                f"{missing}. Drop the role, or name the modules in a plain LoraConfig."
            )
    return [target for target in found if target.role in roles]


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


def coverage_report(model: nn.Module) -> Coverage:
    """Count, by kind, the targets that `model` has, those that LoRA is on, and their trainable parameters.

    Args:
        model (`nn.Module`): a [`~peft.PeftModel`] or any MoE model.
    """
    trainable: dict[str, int] = {}
    adapted: set[str] = set()
    for wrapped_name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        parameter_name = getattr(module, "parameter_name", None)
        name = without_wrappers(wrapped_name) + (f".{parameter_name}" if parameter_name else "")
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
