"""Whether a configuration fits a model: all that is checked before an adapter changes anything."""

from collections.abc import Iterable

from torch import nn

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import MoELayer, MoEModel, module_of, without_wrappers
from ..quantization.other_quantizers import check_expert_storage
from ..tiers.plan import TierPlan, make_plan
from ..tiers.router_check import calls_experts, check_router
from ..tiers.routing import check_weights, settings_of
from .config import OrdMoEConfig
from .expert_selection import check_selection
from .lora_fields import (
    check_modules_to_save,
    check_whole_model,
    expert_rank_of,
    in_few_patterns,
    resolve_patterns,
    with_expert_rank,
)
from .offloading import check_offloading
from .targets import Target, base_moe, matrices_beside_linears, resolve_targets


def check_fits_model(config: OrdMoEConfig, model: nn.Module) -> tuple[list[Target], TierPlan]:
    """See that `config` fits `model`. Returns what its roles stand for, and the plan of its tier 1.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: it does not.
    """
    check_whole_model(config, model)
    check_expert_storage(model)
    moe = MoEModel.of(model)
    check_base(config, model)
    plan = make_plan(moe.layers, 1, settings_of(config))
    targets = check_targets(config, model)
    check_selection(config, moe.layers)
    check_routers_are_reached(moe.layers, targets)
    check_experts_are_reached(moe.layers, targets)
    check_unshared_targets(model, targets)
    check_names_of_targets(model, targets)
    check_offloading(model, targets)
    check_modules_to_save(config, model, [layer.block_name for layer in moe.layers])
    if config.tier_weights == "match":
        for layer in moe.layers:
            check_weights(layer)
    return targets, plan


def check_routers_are_reached(layers: list[MoELayer], targets: list[Target]) -> None:
    """See that each router that is adapted calls the module that has its matrix, so that LoRA there has an effect.

    Raises:
        [`OrdMoEModelError`]: one reads the matrix itself.
    """
    if not any(target.role == "router" for target in targets):
        return
    # It is a matter of code: one router of each class is run.
    linears = [layer for layer in reversed(layers) if type(layer.router_matrix_owner) is nn.Linear]
    of_classes = {type(layer.router): layer for layer in linears}
    for layer in of_classes.values():
        if not check_router(layer).calls_matrix:
            raise OrdMoEModelError(
                f"{layer.router_name} ({type(layer.router).__name__}) or its block reads {layer.router_matrix} itself, "
                "past the module that has it, so LoRA there would do nothing until it is merged. Leave 'router' out of "
                "targets."
            )


def check_experts_are_reached(layers: list[MoELayer], targets: list[Target]) -> None:
    """See that experts of the kinds that their block knows alone are called, not read, so that LoRA has an effect.

    Raises:
        [`OrdMoEModelError`]: they are read, or LoRA has no layer for some of their matrices.
    """
    if not any(target.role == "experts" for target in targets):
        return
    for layer in {(type(layer.block), layer.kind): layer for layer in reversed(layers)}.values():
        named = f"the experts in {layer.experts_name} ({type(layer.experts).__name__})"
        holders = {module_of(layer.experts, name.rpartition(".")[0]) for name in layer.projections}
        if layer.kind == "stacks" and any(type(holder).forward is nn.Module.forward for holder in holders):
            raise OrdMoEModelError(
                f"{layer.block_name} reads {named} itself: they have no forward that LoRA could be put on. Leave "
                "'experts' out of targets."
            )
        if layer.kind != "modules":
            continue
        other = matrices_beside_linears(layer.experts)
        if other:
            raise OrdMoEModelError(
                f"{named} have {other[0]}, which is of no nn.Linear, so LoRA would adapt a part of them alone. Leave "
                "'experts' out of targets."
            )
        if not calls_experts(layer):
            raise OrdMoEModelError(
                f"{layer.block_name} reads the weights of {named} itself and does not call them, so LoRA there would "
                "do nothing until it is merged. Leave 'experts' out of targets."
            )


def check_unshared_targets(model: nn.Module, targets: list[Target]) -> None:
    """Raise [`OrdMoEModelError`] for a module that layers share, which LoRA would wrap for each of them."""
    first: dict[tuple[int, str], str] = {}
    for target in targets:
        owner, _, attribute = target.name.rpartition(".") if target.is_parameter else (target.name, "", "")
        other = first.setdefault((id(module_of(model, owner)), attribute), target.name)
        if other != target.name:
            raise OrdMoEModelError(
                f"{other} and {target.name} are of one and the same module, which LoRA would wrap twice. Leave "
                f"{target.role!r} out of targets."
            )


def check_names_of_targets(model: nn.Module, targets: list[Target]) -> None:
    """Raise [`OrdMoEModelError`] where PEFT would put LoRA on more than the targets.

    It takes the full name of a target for the ending of a name (`check_target_module_exists`, peft 0.21.2).
    """
    of_targets = {target.name: target for target in targets}
    for names in (model.named_modules(), model.named_parameters()):
        for name in {without_wrappers(name) for name, _ in names} - of_targets.keys():
            ending = name
            while "." in ending:
                ending = ending.partition(".")[2]
                if ending in of_targets:
                    raise OrdMoEModelError(
                        f"PEFT would put LoRA on {name} too, whose name ends with {ending}. Leave "
                        f"{of_targets[ending].role!r} out of targets."
                    )


def check_base(config: OrdMoEConfig, model: nn.Module) -> None:
    """See that the base has the sizes that `config` recorded, if it did.

    Raises:
        [`OrdMoEModelError`]: the adapter was made for a base of other sizes.
    """
    sizes = base_moe(model)
    if config.base_moe is not None and config.base_moe != sizes:
        differences = ", ".join(
            f"{name} {config.base_moe.get(name)} (this model: {size})"
            for name, size in sizes.items()
            if config.base_moe.get(name) != size
        )
        raise OrdMoEModelError(
            f"The adapter was made for another base, {config.base_model_name_or_path!r}, with {differences}. Load it "
            "on that base."
        )


def check_targets(config: OrdMoEConfig, model: nn.Module) -> list[Target]:
    """The modules and the parameters that the roles in `config.targets` stand for.

    Raises:
        [`OrdMoEModelError`]: a role matches nothing or only part of the layers.
        [`OrdMoEConfigError`]: names were given that the roles do not stand for.
    """
    targets = resolve_targets(model, config.targets)
    for field, given, is_parameter in (
        ("target_modules", config.target_modules, False),
        ("target_parameters", config.target_parameters, True),
    ):
        resolved = {target.name for target in targets if target.is_parameter == is_parameter}
        if given and set(given) != resolved and _names_meant(model, given) != resolved:
            raise OrdMoEConfigError(
                f"{field}={sorted(given) if not isinstance(given, str) else given!r} is not what targets="
                f"{config.targets} stands for in {type(model).__name__}. Set `targets` alone and leave {field} unset."
            )
    return targets


def fill_in_targets(config: OrdMoEConfig, targets: list[Target], layers: list[MoELayer]) -> None:
    """Write explicit names and ranks into `config`. They are saved with the adapter, so that plain PEFT can load it.

    Raises:
        [`OrdMoEConfigError`]: a pattern of `config` stands for none of `targets`, or for another rank of experts.
        [`OrdMoEModelError`]: the rank of experts is not known.
    """
    config.target_modules = {target.name for target in targets if not target.is_parameter}
    config.target_parameters = sorted(target.name for target in targets if target.is_parameter)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = resolve_patterns(field, getattr(config, field) or {}, targets)
        if field == "rank_pattern" and config.expert_rank is not None:
            config.expert_rank = expert_rank_of(config, layers)
            patterns = with_expert_rank(patterns, config.expert_rank, targets)
        setattr(config, field, in_few_patterns(patterns, targets))


def _names_meant(model: nn.Module, endings: str | Iterable[str]) -> set[str]:
    """The modules of `model` whose names end with one of `endings`.

    PEFT shortens 20 and more names to endings that no other module shares (`_find_minimal_target_modules`,
    `peft/tuners/tuners_utils.py`), and saves these.
    """
    if isinstance(endings, str):
        return set()  # a regular expression
    names = [without_wrappers(name) for name, _ in model.named_modules()]
    return {name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)}
