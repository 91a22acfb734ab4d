"""Which of PEFT's LoRA settings an OrdMoE adapter can have: each takes effect, or is refused by name."""

import re
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig
from torch import nn

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import MoELayer, without_wrappers
from .targets import Target


# Why a setting cannot take effect, whatever is adapted.
NEVER = {
    "exclude_modules": "has no effect on the full names that `targets` stands for",
    "layers_to_transform": "has no effect on the full names that `targets` stands for",
    "layers_pattern": "has no effect on the full names that `targets` stands for",
    "fan_in_fan_out": "is for layers that hold their weight transposed; models with fused experts have none",
    "megatron_config": "is for Megatron's layers, which models of transformers do not have",
    "use_qalora": "is for layers quantised by GPTQ, whose experts OrdMoE cannot read",
}
# PEFT puts LoRA on parameters without these, and without its variants (DoRA and others), which it marks as such.
NOT_ON_PARAMETERS = (
    "lora_dropout",
    "lora_bias",
    "bias",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
)
INITIALISATIONS_ON_PARAMETERS = (True, False, "gaussian")
# The value of `expert_rank` that stands for r over the experts of a token.
RANK_OVER_K = "r/K"
# What PEFT adds to `modules_to_save` by itself for a task, in the hope that one of them is there.
HEADS_OF_TASKS = {"classifier", "score", "qa_outputs"}


def roles_of(config: Any) -> set[str]:
    """The roles that `config.targets` names, in whole or in part."""
    return {target.partition(".")[0] for target in config.targets}


def check_any_target(config: LoraConfig) -> None:
    """See that no setting is made that has no effect, or a wrong one, whatever is adapted.

    Raises:
        [`OrdMoEConfigError`]: one is.
    """
    for name, reason in NEVER.items():
        if getattr(config, name):
            raise OrdMoEConfigError(f"{name}={getattr(config, name)!r} {reason}. Leave it unset.")


def check_parameter_targets(config: LoraConfig) -> None:
    """See that each setting can be applied to routers and fused experts, if `config.targets` names them.

    Raises:
        [`OrdMoEConfigError`]: one cannot.
    """
    if not {"router", "experts"} & roles_of(config):
        return
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        is_of_linears = field.name in NOT_ON_PARAMETERS or field.metadata.get("is_lora_variant")
        if is_of_linears and getattr(config, field.name) != default:
            _refuse_on_parameters(config, field.name, f"Leave it at {default!r}")
    if config.init_lora_weights not in INITIALISATIONS_ON_PARAMETERS:
        _refuse_on_parameters(config, "init_lora_weights", f"Set it to one of {INITIALISATIONS_ON_PARAMETERS}")


def _refuse_on_parameters(config: LoraConfig, name: str, remedy: str) -> None:
    raise OrdMoEConfigError(
        f"{name}={getattr(config, name)!r} cannot be applied to routers and fused experts, which targets="
        f"{config.targets} names. {remedy}, or set targets to 'attention' or 'shared_experts' alone."
    )


def check_expert_rank(config: Any) -> None:
    """See that `config.expert_rank` can be the rank of experts.

    Raises:
        [`OrdMoEConfigError`]: it cannot, or no expert is adapted.
    """
    rank = config.expert_rank
    if rank is None:
        return
    if rank != RANK_OVER_K if isinstance(rank, str) else rank < 1:
        raise OrdMoEConfigError(f"expert_rank must be at least 1, or {RANK_OVER_K!r}, got {rank!r}.")
    if "experts" not in roles_of(config):
        raise OrdMoEConfigError(
            f"expert_rank={rank!r} is for experts, which targets={config.targets} has not. Leave it unset, or add "
            "'experts' to targets."
        )


def changes_base_weights(config: LoraConfig) -> bool:
    """Whether the adapter's initialisation may write into the weights that it is put on."""
    return config.init_lora_weights not in INITIALISATIONS_ON_PARAMETERS or config.kasa_config is not None


def check_whole_model(config: LoraConfig, model: nn.Module) -> None:
    """See that `model` need not get other layers, and that PEFT's model for `config.task_type` can hold it.

    PEFT looks for what generates when the adapter is attached already.

    Raises:
        [`OrdMoEConfigError`]: `config` asks for other layers.
        [`OrdMoEModelError`]: the task needs another model.
    """
    if config.layer_replication:
        raise OrdMoEConfigError(
            f"layer_replication={config.layer_replication!r} would have layers share routers and experts, and their "
            "tiers. Leave it unset, or save the model with its layers replicated and adapt that."
        )
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise OrdMoEModelError(
            f"task_type={config.task_type!r} needs a model that generates, which {type(model).__name__} does not. "
            "Load it with its head, or leave task_type unset."
        )


def check_modules_to_save(config: LoraConfig, model: nn.Module, block_names: list[str]) -> None:
    """See that each of `modules_to_save` names modules, none of them with or within a MoE block.

    Raises:
        [`OrdMoEConfigError`]: one does not.
    """
    names = [without_wrappers(name) for name, _ in model.named_modules()]
    for ending in config.modules_to_save or ():
        meant = [name for name in names if name.endswith(ending)]
        if not meant and ending not in HEADS_OF_TASKS:
            raise OrdMoEConfigError(f"modules_to_save has {ending!r}, but no module of {type(model).__name__} ends so.")
        within = [name for name in meant for block in block_names if _is_within(name, block) or _is_within(block, name)]
        if within:
            raise OrdMoEConfigError(
                f"modules_to_save has {ending!r}, which stands for {within[0]}: PEFT would train a copy of it that is "
                "not held to tiers. Adapt routers, experts and shared experts by `targets`."
            )


def _is_within(name: str, parent: str) -> bool:
    return f"{name}.".startswith(f"{parent}.")


def resolve_patterns(field: str, patterns: dict[str, Any], targets: list[Target]) -> dict[str, Any]:
    """`patterns` by the full names of the `targets` that they stand for.

    PEFT looks a parameter up by its own name alone, where a pattern for its module would be passed over, and takes the
    first pattern that matches, though it saves them sorted. Here a pattern may name a parameter's module, and one that
    names the parameter itself goes before.

    Raises:
        [`OrdMoEConfigError`]: one stands for nothing that is adapted.
    """
    resolved, used = {}, set()
    for target in targets:
        module_name = target.name.rpartition(".")[0] if target.is_parameter else target.name
        by_name = [pattern for pattern in patterns if _matches(pattern, target.name)]
        matching = by_name + [pattern for pattern in patterns if _matches(pattern, module_name)]
        used.update(matching)
        if matching:
            resolved[target.name] = patterns[matching[0]]
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        last = max(target.layer for target in targets)
        raise OrdMoEConfigError(
            f"{field} has {unused[0]!r}, which is no module and no parameter that is adapted. Those of the last layer: "
            f"{[target.name for target in targets if target.layer == last]}."
        )
    return resolved


def expert_rank_of(config: Any, layers: list[MoELayer]) -> int:
    """The number that `config.expert_rank` stands for in a model with these MoE layers.

    Raises:
        [`OrdMoEModelError`]: it is `"r/K"`, and K is not known, or not the same in all layers.
    """
    if config.expert_rank != RANK_OVER_K:
        return config.expert_rank
    top_ks = sorted({layer.top_k for layer in layers})
    if len(top_ks) > 1 or 0 in top_ks:
        raise OrdMoEModelError(
            f"expert_rank={RANK_OVER_K!r} needs one K for all MoE layers, and this model's have {top_ks} experts per "
            "token (0: not known). Give expert_rank as a number."
        )
    return -(-config.r // top_ks[0])


def with_expert_rank(patterns: dict[str, int], rank: int, targets: list[Target]) -> dict[str, int]:
    """`patterns` of ranks by the full names of `targets`, with `rank` for all experts.

    Raises:
        [`OrdMoEConfigError`]: the patterns give experts another rank.
    """
    names = [target.name for target in targets if target.role == "experts"]
    other = next((name for name in names if patterns.get(name, rank) != rank), None)
    if other is not None:
        raise OrdMoEConfigError(
            f"expert_rank stands for {rank}, and rank_pattern gives {other} the rank {patterns[other]}. Set one of the "
            "two for experts."
        )
    return patterns | dict.fromkeys(names, rank)


def in_few_patterns(patterns: dict[str, Any], targets: list[Target]) -> dict[str, Any]:
    """`patterns` by full names, with one for a layer's experts that are modules, where they have the same value.

    PEFT tries every pattern on every module, of which a model can have thousands then.
    """
    alike: dict[str, list[str]] = {}
    for target in targets:
        if target.role == "experts" and not target.is_parameter and target.name in patterns:
            layer, within = re.match(r"(.*?\.\d+\.)(.*)", target.name).groups()  # type: ignore[union-attr]
            alike.setdefault(layer + re.sub(r"(?<=[._])\d+(?=\.)", r"\\d+", within), []).append(target.name)
    few = dict(patterns)
    for pattern, names in alike.items():
        meant = [target.name for target in targets if _matches(pattern, target.name)]
        if meant == names and len({patterns[name] for name in names}) == 1:
            few = {name: value for name, value in few.items() if name not in names} | {pattern: patterns[names[0]]}
    return few


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule (`get_pattern_key`, `peft/utils/other.py`)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
