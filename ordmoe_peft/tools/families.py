"""What of a model is covered and what is not, from its configuration alone: tiers, LoRA, 4 bits."""

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import pandas as pd
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..adapter.config import ROLES, OrdMoEConfig
from ..adapter.fitting import check_fits_model
from ..adapter.targets import find_targets, resolve_targets
from ..errors import OrdMoEError, OrdMoEModelError
from ..moe_model import MoELayer, MoEModel
from ..quantization.config import MoeBitsAndBytesConfig
from ..quantization.other_quantizers import check_unquantised
from ..quantization.quantizer import MoeBnb4BitHfQuantizer
from ..tiers.router_check import check_router
from .merge_on_disk.weightless_model import weightless
from .plan.weights import model_class
from .tables import Table


# What upstream's code raises of a configuration that lacks something, or has a size that cannot be.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

UNRANKED = "as usual"
NOTE = f"{UNRANKED}: experts are chosen without ranks, as by the token's id; on all tiers they are the model's own."


@dataclass(frozen=True)
class LayerGroup:
    """MoE layers that are alike.

    Args:
        decoder_layers (`list[int]`): places of their decoder layers.
        block (`str`): name of the module that holds router and experts, with `*` for numbers.
        router (`str`), experts (`str`): their classes.
        layout (`str`): how the experts are held; see [`layer_search`](../layer_search.py).
        num_experts (`int`), top_k (`int`): E and K.
        tiers (`str`): the largest C that fits, as `"up to 16"`; `"refused"`; or `"as usual"` where the choice has no
            ranks (hash layers), which then is that of the model on all tiers.
        refused (`str`, *optional*): why tiers are refused.
    """

    decoder_layers: list[int]
    block: str
    router: str
    experts: str
    layout: str
    num_experts: int
    top_k: int
    tiers: str
    refused: str | None


@dataclass(frozen=True)
class FamilyReport:
    """What of a model is covered.

    Args:
        model_class (`str`): its class.
        num_decoder_layers (`int`): its decoder layers, with experts or without.
        layers (list of [`LayerGroup`]): its MoE layers.
        targets (list of `(role, name, number)`): what LoRA goes on, with `*` for numbers in names.
        refused (`dict[str, str]`): `"tiers"`, `"lora"` (any adapter), a role that cannot be adapted, or `"4 bits"` →
            why it is refused. What is not named works.
        left_alone (`dict[str, int]`): parts that take no text, as vision towers → their MoE layers. These are left
            alone, unless such a part is given by itself to `get_peft_model` or `tier_routing`.
    """

    model_class: str
    num_decoder_layers: int
    layers: list[LayerGroup]
    targets: list[tuple[str, str, int]]
    refused: dict[str, str]
    left_alone: dict[str, int]

    to_dict = asdict

    def tables(self) -> list[Table]:
        """The layers, a column for each group, and what LoRA goes on."""
        rows = {
            **{name: name for name in ("block", "router", "experts", "layout")},
            **{"E": "num_experts", "K": "top_k", "tiers": "tiers"},
        }
        layers = pd.DataFrame(
            [[title, *(getattr(group, name) for group in self.layers)] for title, name in rows.items()],
            columns=["", *(f"layers {_ranges(group.decoder_layers)}" for group in self.layers)],
        )
        is_unranked = any(group.tiers == UNRANKED for group in self.layers)
        targets = pd.DataFrame(self.targets, columns=["role", "name", "number"])
        return [
            Table(
                f"MoE layers of {self.model_class}, which has {self.num_decoder_layers} decoder layers",
                layers,
                note=NOTE * is_unranked,
            ),
            Table("What LoRA goes on", targets),
        ]


def build_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` on the meta device.

    Raises:
        [`OrdMoEModelError`]: there is none.
    """
    architecture = (config.architectures or [""])[0]
    is_remote = trust_remote_code and hasattr(config, "auto_map") and not hasattr(transformers, architecture)
    try:
        with torch.device("meta"):
            if is_remote:
                return AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
            return model_class(config)(copy.deepcopy(config)).eval()
    except OrdMoEError:
        raise
    except FAILURES as error:
        raise OrdMoEModelError(
            f"No model can be built from this configuration of {config.model_type!r} with architectures="
            f"{config.architectures}: {type(error).__name__}: {error}"
        ) from error


def describe_family(model: PreTrainedModel, name: str = "") -> FamilyReport:
    """What of a model is covered.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, on the meta device; it is given weights that take next to
            no memory.
        name (`str`, *optional*): what messages call its checkpoint; its class by default.

    Raises:
        [`OrdMoEModelError`]: it has no MoE layers.
    """
    moe = MoEModel.of(model)
    refused = {"4 bits": _refusal(check_unquantised, model.config, name or type(model).__name__)}
    if refused["4 bits"]:
        del model.config.quantization_config
        refused["4 bits"] += " What else is said here is said of the dense model."
    else:
        quantizer = MoeBnb4BitHfQuantizer(MoeBitsAndBytesConfig(), pre_quantized=False)
        refused["4 bits"] = _refusal(quantizer.select, model, ())
    _give_weights_(model, moe.layers)
    groups = [_group(layers) for layers in _alike(moe.layers)]
    refused["tiers"] = next((group.refused for group in groups if group.refused), None)
    fitting = min(group.num_experts // max(group.top_k, 1) for group in groups)
    num_tiers = max(1, min(OrdMoEConfig.num_tiers, fitting))
    refused["lora"] = refused["tiers"]  # which adapters impose
    if fitting < 2 and not refused["tiers"]:
        refused["tiers"] = "the experts of a layer are too few for two tiers, 2·K > E."
    targets: Counter[tuple[str, str]] = Counter()
    there = {"router", "experts", *(target.role for target in find_targets(model))}
    for role in ROLES if not refused["lora"] else ():
        if role not in there:
            continue
        refused[role] = _refusal(check_fits_model, OrdMoEConfig(targets=[role], num_tiers=num_tiers), model)
        if not refused[role]:
            targets.update((role, _pattern(target.name)) for target in resolve_targets(model, [role]))
    return FamilyReport(
        model_class=type(model).__name__,
        num_decoder_layers=len(moe.decoder_layers),
        layers=groups,
        targets=[(*target, number) for target, number in targets.items()],
        refused={what: why for what, why in refused.items() if why},
        left_alone=_left_alone(moe),
    )


def _give_weights_(model: nn.Module, layers: list[MoELayer]) -> None:
    """Give `model`, which is on the meta device, weights on the CPU: random ones of the routers, the same ones where
    these are alike, and zeros that take no memory."""
    routers = {part for layer in layers if layer.router is not None for part in layer.router.modules()}
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            weight = weightless(tensor)
            if module in routers and tensor.is_floating_point():
                key = (type(module), name, tensor.shape, tensor.dtype)
                made[key] = made[key] if key in made else torch.randn(key[2], dtype=key[3], generator=generator)
                weight = nn.Parameter(made[key]) if isinstance(tensor, nn.Parameter) else made[key]
            setattr(module, name, weight)
    # A block that chooses by its router's scores is run as a whole: the products of large experts would take minutes.
    for layer in layers:
        for number, part in enumerate(layer.experts.children() if layer.kind == "modules" else [layer.experts]):
            if part is not layer.block:
                part.forward = partial(_stand_in, number)


def _stand_in(number: int, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of an expert: what it is given, times a number of its own and what else it is given, as indices."""
    first, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return first * (number + sum((other.double().square().sum().to(first.dtype) for other in others), start=0.0))


def _alike(layers: list[MoELayer]) -> list[list[MoELayer]]:
    """The layers, those together that are alike."""
    groups: dict[tuple, list[MoELayer]] = {}
    for layer in layers:
        shapes = tuple((name, weight.shape) for name, weight in (layer.router or layer.block).named_parameters())
        kind = (type(layer.router), type(layer.experts), _layout(layer), layer.num_experts, layer.top_k)
        groups.setdefault((_pattern(layer.block_name), shapes, kind), []).append(layer)
    return [*groups.values()]


def _group(layers: list[MoELayer]) -> LayerGroup:
    """What layers are that are alike. The first is tried."""
    first, refused = layers[0], None
    try:
        tiers = f"up to {first.num_experts // first.top_k}" if check_router(first).is_ranked else UNRANKED
    except OrdMoEError as error:
        tiers, refused = "refused", str(error)
    return LayerGroup(
        decoder_layers=[layer.decoder_layer for layer in layers],
        block=_pattern(first.block_name),
        router=type(first.router).__name__,
        experts=type(first.experts).__name__,
        layout=_layout(first),
        num_experts=first.num_experts,
        top_k=first.top_k,
        tiers=tiers,
        refused=refused,
    )


def _layout(layer: MoELayer) -> str:
    flags = {"is_transposed": "transposed", "has_bias": "biased"}
    return ", ".join([layer.kind, *(word for flag, word in flags.items() if getattr(layer.experts, flag, False))])


def _left_alone(moe: MoEModel) -> dict[str, int]:
    """Parts of the model without text layers → their MoE layers."""
    of_text = {layer.block_name for layer in moe.layers}
    found: Counter[str] = Counter()
    for layer in moe.all_layers:
        if layer.block_name not in of_text:
            parts = accumulate(layer.block_name.split("."), "{}.{}".format)
            found[next(part for part in parts if not any(f"{name}.".startswith(f"{part}.") for name in of_text))] += 1
    return dict(found)


def _refusal(check: Callable[..., Any], *args: Any) -> str | None:
    """What `check` refuses its arguments with, if it does."""
    try:
        check(*args)
    except OrdMoEError as error:
        return str(error)
    return None


def _pattern(name: str) -> str:
    """The name of a module with `*` in place of numbers."""
    return re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name)


def _ranges(numbers: list[int]) -> str:
    """Whole numbers in ascending order, those that follow one another shortened: `0-2, 5`."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
