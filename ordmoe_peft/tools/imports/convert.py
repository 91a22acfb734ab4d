"""A plain LoRA adapter of another tool made an OrdMoE adapter."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from ...adapter.config import ROLES, OrdMoEConfig
from ...adapter.saved import opened, read_json
from ...errors import OrdMoEConfigError, OrdMoEModelError
from ...files import whole_folder
from ...merging.in_memory import lora_layers
from ...moe_model import unwrapped, without_wrappers
from ..families import build_model
from ..lora_factors import Factors, joined, stacked, with_one_scaling
from ..merge_on_disk.checkpoint import open_checkpoint
from ..merge_on_disk.weightless_model import make_weightless_
from ..plan.known_models import find_config
from ..stored_routers import StoredRouters
from .layouts import SOURCE_LAYOUTS, told_layout
from .places import Meaning, Place, Places, split_key


# What a LoRA adapter may have beside the two factors, or what makes another forward of them, which is not imported
# (`peft/tuners/lora/config.py`, peft 0.21.2).
NOT_IMPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Values of init_lora_weights that leave the base as it is. PEFT changes the base's weights by the others when it loads.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Imported:
    """What [`import_adapter`] wrote.

    Args:
        layout (`str`): how the experts were held.
        targets (`list[str]`): the roles that are adapted.
        rank (`int`): the rank.
        adapted (`int`), filled (`int`): weights with LoRA of the source's, and those of the same roles that it left
            alone, which have zeros.
    """

    layout: str
    targets: list[str]
    rank: int
    adapted: int
    filled: int


def import_adapter(
    source: str | Path,
    output: str | Path,
    base: str,
    source_layout: str = "auto",
    num_tiers: int = 1,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> Imported:
    """Write the LoRA adapter in folder `source` to folder `output` as an OrdMoE adapter, with the same outputs.

    Args:
        source (`str` or `Path`): folder with `adapter_config.json` and `adapter_model.safetensors`.
        output (`str` or `Path`): folder to write to; must not exist, or be empty.
        base (`str`): folder or hub id of the base. Its configuration is read, and of a folder with weights those of
            routers and embeddings, by which another base is noticed when the adapter is loaded.
        source_layout (`str`, defaults to `"auto"`): how the source holds its experts ([`layouts`](layouts.py)).
        num_tiers (`int`, defaults to 1): C of the OrdMoE adapter; the source was trained without tiers.
        revision (`str`), trust_remote_code (`bool`): of the base.

    Raises:
        [`OrdMoEConfigError`]: the source is no plain LoRA adapter, or its layout cannot be told.
        [`OrdMoEModelError`]: it does not fit the base, or a tensor is missing, unknown or broken.
    """
    source, output = Path(source), Path(output)
    if source_layout not in SOURCE_LAYOUTS:
        raise OrdMoEConfigError(f"source_layout must be one of {SOURCE_LAYOUTS}, got {source_layout!r}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OrdMoEConfigError(f"output {output} exists already, and is left as it is. Choose another folder.")
    settings, pairs, hints = read_source(source)
    model = build_model(find_config(base, revision, trust_remote_code), trust_remote_code)
    places = Places(model)
    layout, found = updates(pairs, settings, places, source_layout, hints)
    roles = {places.by_weight[name].role for name in found}
    every = {name: place for name, place in places.by_weight.items() if place.role in roles}
    filled = {name: found.get(name) or _zeros(place, found) for name, place in every.items()}
    filled, rank, scaling = with_one_scaling(filled)
    if not float(scaling * rank).is_integer():  # of 1 / √r: alpha is a whole number
        filled, scaling = {name: factors.folded() for name, factors in filled.items()}, 1.0
    targets = [role for role in ROLES if role in roles]
    config = OrdMoEConfig(
        r=rank,
        lora_alpha=round(scaling * rank),
        targets=targets,
        num_tiers=num_tiers,
        task_type=settings.get("task_type"),
        inference_mode=True,
    )
    model.name_or_path = base
    tuned = get_peft_model(make_weightless_(model, _known_weights(model, base)), config, autocast_adapter_dtype=False)
    for (owner, attribute), layer in lora_layers(tuned).items():
        name = next(n for n, module in tuned.base_model.model.named_modules() if module is unwrapped(owner))
        A, B = filled[f"{without_wrappers(name)}.{attribute}"].to_peft()
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    state = {name: weight for name, weight in tuned.named_parameters() if ".lora_" in name}
    with whole_folder(output) as folder:  # with a state given, no probes are made, which need the base's weights
        tuned.save_pretrained(folder, state_dict=state)
    return Imported(layout, targets, rank, len(found), len(every) - len(found))


def _known_weights(model: PreTrainedModel, base: str) -> dict[str, torch.Tensor]:
    """The weights by which a base is known, where its folder is at hand and has them."""
    if not any(Path(base).glob("*.safetensors")):
        return {}
    with suppress(OrdMoEModelError):  # in a form that is not read; then other weights are not noticed
        return StoredRouters(model, open_checkpoint(Path(base))).weights()
    return {}


def read_source(source: Path) -> tuple[dict[str, Any], dict[str, tuple[torch.Tensor, torch.Tensor]], str]:
    """The settings of a LoRA adapter, the two matrices of each module, and what its texts say.

    Raises:
        [`OrdMoEConfigError`], [`OrdMoEModelError`]: it is no plain LoRA adapter in safetensors, or a tensor is broken.
    """
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (source / name).is_file()]
    if missing:
        others = sorted(path.name for path in source.glob("adapter_model.*"))
        raise OrdMoEConfigError(
            f"{source} has no {' and no '.join(missing)}. Weights that are there: {others or 'none'}; pickle files are "
            "not read."
        )
    settings = read_json(source / CONFIG_NAME)
    check_settings(settings, source / CONFIG_NAME)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    with opened(source / SAFETENSORS_WEIGHTS_NAME) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not tensors:
        raise OrdMoEModelError(f"{source / SAFETENSORS_WEIGHTS_NAME} has no tensors. Save the adapter again.")
    for key, tensor in tensors.items():
        module, factor = split_key(key)
        if tensor.dtype not in DTYPES or tensor.dim() != 2 or not torch.isfinite(tensor).all():
            raise OrdMoEModelError(
                f"{key} in {source / SAFETENSORS_WEIGHTS_NAME} is no matrix of finite numbers of 16 or 32 bits: "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}. Save the adapter again."
            )
        halves.setdefault(module, {})[factor] = tensor
    incomplete = [module for module, pair in halves.items() if len(pair) < 2]
    if incomplete:
        (there,) = halves[incomplete[0]]
        raise OrdMoEModelError(
            f"{source} has lora_{there} of {incomplete[0]} without the other. Save the adapter again."
        )
    card = source / "README.md"
    hints = json.dumps(settings) + (card.read_text(errors="replace") if card.is_file() else "")
    return settings, {module: (pair["A"], pair["B"]) for module, pair in halves.items()}, hints


def check_settings(settings: Any, file: Path) -> None:
    """See that an `adapter_config.json` is of plain LoRA, which is the two factors and a scaling.

    Raises:
        [`OrdMoEConfigError`]: it is not.
    """
    kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
    if kind != "LORA":
        raise OrdMoEConfigError(f"{file.parent} holds a {kind} adapter; plain LoRA is imported.")
    for name in NOT_IMPORTED:
        if settings.get(name) not in (None, False, [], {}):
            raise OrdMoEConfigError(f"{file.parent} has {name}={settings[name]!r}, which is not imported.")
    start = settings.get("init_lora_weights")
    if start not in INITIALIZATIONS:
        raise OrdMoEConfigError(
            f"{file} has init_lora_weights={start!r}, with which PEFT changes the base's weights when it loads the "
            "adapter. Save it as plain LoRA (`path_initial_model_for_weight_conversion` of PEFT's `save_pretrained`)."
        )
    values = {name: settings.get(name) for name in ("r", "lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(field) or {}
        try:
            values |= {f"{field}[{re.compile(pattern).pattern!r}]": value for pattern, value in patterns.items()}
        except (AttributeError, re.error) as error:
            raise OrdMoEConfigError(f"{file} has {field}={patterns!r}, no mapping of patterns: {error}.") from error
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OrdMoEConfigError(f"{file} has {name}={value!r}, not a number.")
    if not isinstance(settings.get("use_rslora", False), bool | None):
        raise OrdMoEConfigError(f"{file} has use_rslora={settings['use_rslora']!r}, not true or false.")


def updates(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    settings: Mapping[str, Any],
    places: Places,
    source_layout: str,
    hints: str,
) -> tuple[str, dict[str, Factors]]:
    """The layout of the experts, and the update of each weight that the source adapts.

    Raises:
        [`OrdMoEConfigError`], [`OrdMoEModelError`]: as [`import_adapter`].
    """
    meanings = {module: places.meaning(module) for module in pairs}
    by_meaning: dict[Meaning, str] = {}
    for module, meaning in meanings.items():
        if by_meaning.setdefault(meaning, module) != module:
            raise OrdMoEModelError(
                f"The adapter has {by_meaning[meaning]} and {module}, which are one place on this base, so one of them "
                "would be lost. Save the adapter again."
            )
    fused = {module: meaning for module, meaning in meanings.items() if meaning.is_inner is not None}
    single = {module: meaning for module, meaning in meanings.items() if meaning.expert is not None}
    if fused and single:
        raise OrdMoEModelError(f"The adapter has keys of whole stacks, {min(fused)}, and of experts, {min(single)}.")
    if (fused and source_layout == "per-expert") or (single and source_layout not in ("auto", "per-expert")):
        raise OrdMoEConfigError(
            f"source_layout={source_layout!r}, but the adapter has {min(fused or single)}. Pass 'auto'."
        )
    found: dict[str, Factors] = {}
    for module in meanings.keys() - fused.keys() - single.keys():
        place = places.by_weight[f"{meanings[module].owner}.weight"]
        found[place.weight] = _matrix(pairs[module], place.shape[1:], _scaling(settings, module, pairs[module]), module)
    stacks = {module: (*pairs[module], _place_of(module, fused, pairs[module], places, settings)) for module in fused}
    layout = "per-expert" if single else source_layout
    if stacks:
        told = told_layout(stacks, settings, source_layout, hints)
        layout = "unsloth" if told.is_expert_slowest else "peft-0.18" if told.is_reversed else "peft"
        for A, B, place in stacks.values():
            scaling = _scaling(settings, place.weight, (A, B), place.shape[0])
            found[place.weight] = told.factors(A, B, place, scaling)
    found |= _by_expert(single, pairs, settings, places)
    named = tuple(f".{name}" for name in settings.get("target_parameters") or [])
    absent = [name for name in places.by_weight if f".{name}".endswith(named) and name not in found]
    if absent:
        raise OrdMoEModelError(
            f"The adapter has no LoRA on {absent[0]}, which target_parameters in its adapter_config.json names: its "
            "weights are not whole. Copy or save it again."
        )
    return layout, found


def _place_of(
    module: str,
    fused: Mapping[str, Meaning],
    pair: tuple[torch.Tensor, torch.Tensor],
    places: Places,
    settings: Mapping[str, Any],
) -> Place:
    """The stack that a key of fused experts is for. PEFT wraps them in the model's order, each within the next."""
    meaning = fused[module]
    stacks = places.stacks[meaning.owner]
    if sum(other.owner == meaning.owner for other in fused.values()) == len(stacks):
        return stacks[0] if meaning.is_inner else stacks[-1]
    named = [
        place
        for place in stacks
        if any(f".{place.weight}".endswith(f".{name}") for name in settings.get("target_parameters") or [])
    ]
    sides = sorted((pair[0].shape[1], pair[1].shape[0]))
    fitting = named if len(named) == 1 else [place for place in stacks if sorted(place.shape[1:]) == sides]
    if len(fitting) != 1:
        raise OrdMoEConfigError(
            f"{module} is of one of {[place.weight for place in stacks]}, and neither shapes nor target_parameters in "
            "adapter_config.json say of which. Write its name there."
        )
    return fitting[0]


def _by_expert(
    single: Mapping[str, Meaning],
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    settings: Mapping[str, Any],
    places: Places,
) -> dict[str, Factors]:
    """The updates of stacks out of those of their experts; experts without one have zeros."""
    given: dict[str, dict[tuple[int, str], Factors]] = {}
    for module, meaning in single.items():
        up, down = places.stacks[meaning.owner]
        has_gate = up.stack_of is not None and up.stack_of.experts.has_gate
        _, out_features, in_features = down.shape if meaning.part == "down" else up.shape
        expert = meaning.expert or 0
        if expert not in range(up.shape[0]) or (meaning.part == "gate" and not has_gate):
            raise OrdMoEModelError(f"The adapter has LoRA on {module}, which the base does not have.")
        half = out_features // 2 if meaning.part != "down" and has_gate else out_features
        scaling = _scaling(settings, module, pairs[module])
        factors = _matrix(pairs[module], (half, in_features), scaling, module)
        given.setdefault(meaning.owner, {})[expert, str(meaning.part)] = factors
    found = {}
    for owner, experts in given.items():
        up, down = places.stacks[owner]
        by_part = {}
        for part in {part for _, part in experts}:
            of_part = {index: factors for (index, name), factors in experts.items() if name == part}
            like = next(iter(of_part.values()))
            nothing = Factors(torch.zeros_like(like.A_ERI), torch.zeros_like(like.B_EOR), like.scaling)
            by_part[part] = stacked(of_part.get(index, nothing) for index in range(up.shape[0]))
        if "down" in by_part:
            found[down.weight] = by_part.pop("down")
        if by_part and up.stack_of is not None and up.stack_of.experts.has_gate:
            other = next(iter(by_part.values()))
            nothing = Factors(other.A_ERI, torch.zeros_like(other.B_EOR), other.scaling)
            gate, upper = by_part.get("gate", nothing), by_part.get("up", nothing)
            found[up.weight] = joined(gate, upper, up.stack_of.experts.is_concatenated)
        elif by_part:
            found[up.weight] = by_part["up"]
    return found


def _matrix(pair: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, ...], scaling: float, module: str) -> Factors:
    A, B = pair
    if (B.shape[0], A.shape[1]) != tuple(shape) or A.shape[0] != B.shape[1]:
        raise OrdMoEModelError(
            f"{module}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no factors of a matrix {tuple(shape)}, "
            "which the base has there. Give the base that the adapter was trained on."
        )
    return Factors.from_peft(A, B, scaling=scaling)


def _scaling(
    settings: Mapping[str, Any], name: str, pair: tuple[torch.Tensor, torch.Tensor], num_experts: int = 1
) -> float:
    """alpha / r, or alpha / √r, of a module or a parameter, by PEFT's rules for patterns.

    Raises:
        [`OrdMoEConfigError`]: its matrices have another rank than the settings say, so its scaling is not known.
    """

    # PEFT matches a linear layer that it has as a parameter by that name alone.
    parameters = [f".{parameter}" for parameter in settings.get("target_parameters") or []]
    is_parameter = any(f".{name}.weight".endswith(parameter) for parameter in parameters)
    key = f"{name}.weight" if is_parameter else name

    def setting(field: str, patterns: str) -> Any:
        by_name = settings.get(patterns) or {}
        return by_name.get(get_pattern_key(by_name.keys(), key), settings[field])

    rank, expected = pair[0].shape[0] / num_experts, setting("r", "rank_pattern")
    if rank != expected:
        raise OrdMoEConfigError(
            f"{name} has rank {rank:g} in the file, and {expected} by r and rank_pattern in adapter_config.json, so "
            "its scaling is not known. Write its rank into rank_pattern."
        )
    alpha = setting("lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _zeros(place: Place, found: Mapping[str, Factors]) -> Factors:
    num_experts, out_features, in_features = place.shape
    like = next(iter(found.values()))
    nothing = Factors.zeros(num_experts, in_features, out_features)
    return Factors(nothing.A_ERI.to(like.A_ERI.dtype), nothing.B_EOR.to(like.A_ERI.dtype), like.scaling)
