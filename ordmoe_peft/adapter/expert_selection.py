"""LoRA that is trained on some experts of each layer, such as those that the data use most.

The factors of all other experts are zero, A as well as B. Then ∂A ∝ Bᵀ and ∂B ∝ A x are zero, and so is each step and
each decay of SGD and AdamW: they stay exactly zero, however training is distributed and accumulated and whenever it is
resumed, with no mask and no hook that something could pass by. Optimizers with states in 8 bits move weights whose
gradients are zero, too (bitsandbytes 0.50.2), so the trainer clears these factors after each step; a loop of one's own
with such an optimizer has to. PEFT keeps a stack's factors in one tensor, so those that are zero are there, in memory
and in the file.

Experts by their share of tokens are an idea of ESFT (arXiv 2407.01906), which trains whole experts.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import MoELayer, MoEModel
from .lora_fields import roles_of
from .targets import adapted_modules


logger = logging.get_logger(__name__)

# MoE layer → its experts. The keys of JSON are strings.
Selection = dict[str, list[int]]


def most_used_experts(report: Mapping[str, Any] | str | Path, share: float, model: str | None = None) -> Selection:
    """The fewest experts of each layer that get `share` of the layer's routed tokens, for `expert_selection`.

    Args:
        report (`dict`, `str` or `Path`): what `ordmoe inspect` wrote as JSON, or the file;
            [`~ordmoe_peft.tools.measure.inspection.HealthReport.to_dict`].
        share (`float`): above 0 and at most 1; a token counts once for each of its K experts.
        model (`str`, *optional*): folder or hub id of the base to train; a report of another is warned about.

    Raises:
        [`OrdMoEConfigError`]: the share is not one, or the file is not there, or no such report.
    """
    if not 0 < share <= 1:
        raise OrdMoEConfigError(f"expert_share must be above 0 and at most 1, got {share!r}.")
    content = report if isinstance(report, Mapping) else _read(Path(report))
    try:
        uses = {str(layer["layer"]): [float(use) for use in layer["utilisation"]] for layer in content["layers"]}
        if not all(0 <= use < math.inf for use_E in uses.values() for use in use_E):
            raise ValueError("a use is negative or no number")
    except (KeyError, TypeError, ValueError) as error:
        source = "The report" if isinstance(report, Mapping) else str(report)
        raise OrdMoEConfigError(
            f"{source} has no `utilisation` of experts by layer ({error}): it is no report of `ordmoe inspect`."
        ) from error
    inspected = content.get("model")
    if model and inspected and Path(model).name != Path(inspected).name:
        logger.warning(
            f"The report of `ordmoe inspect` is of {inspected!r}, and the experts that it chooses are trained in "
            f"{model!r}. Unless these are the same weights, inspect {model!r}: its most-used experts are others."
        )
    return {layer: _fewest(use_E, share) for layer, use_E in uses.items()}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OrdMoEConfigError(
            f"expert_selection={str(file)!r} cannot be read as JSON ({error}). Give the file that `ordmoe inspect` "
            "wrote."
        ) from error


def _fewest(use_E: list[float], share: float) -> list[int]:
    wanted, chosen, sum_so_far = share * sum(use_E) * (1 - 1e-9), [], 0.0  # whatever sums are rounded to
    for expert in sorted(range(len(use_E)), key=lambda expert: -use_E[expert]):
        if sum_so_far >= wanted:
            break
        chosen.append(expert)
        sum_so_far += use_E[expert]
    return sorted(chosen)


def checked_selection(config: Any) -> Selection | None:
    """`config.expert_selection` as it is saved.

    Raises:
        [`OrdMoEConfigError`]: it is not lists of experts by layers, or chooses none, or no expert is adapted.
    """
    given = config.expert_selection
    if given is None:
        return None
    if "experts" not in roles_of(config):
        raise OrdMoEConfigError(
            f"expert_selection is for experts, which targets={config.targets} has not. Leave it unset, or add "
            "'experts' to targets."
        )
    for layer, experts in given.items():
        is_list = isinstance(experts, (list, tuple)) and all(type(expert) is int for expert in experts)
        if not str(layer).isdecimal() or not is_list:
            raise OrdMoEConfigError(
                f"expert_selection must have lists of experts by MoE layers, as {{0: [3, 5], 1: [2]}}, got {layer!r}: "
                f"{experts!r}."
            )
    if not any(given.values()):
        raise OrdMoEConfigError("expert_selection chooses no expert. Leave it unset, or 'experts' out of targets.")
    selection = {str(int(layer)): sorted(set(experts)) for layer, experts in given.items()}
    if len(selection) < len(given):
        raise OrdMoEConfigError(f"expert_selection names a layer twice, as {list(given)}. Leave one of the two out.")
    return selection


def check_selection(config: Any, layers: list[MoELayer]) -> None:
    """See that a model with these MoE layers has what `config.expert_selection` chooses, in stacks.

    Raises:
        [`OrdMoEConfigError`]: it names a layer or an expert that is not there, or leaves a layer out, or is not the one
            that the weights to load were trained with.
        [`OrdMoEModelError`]: experts are modules of their own.
    """
    selection = config.expert_selection
    if config.base_moe is not None and config.saved is not None:
        trained = config.saved.settings.get("expert_selection")
        if trained != selection:
            raise OrdMoEConfigError(
                f"expert_selection={selection!r} cannot be given to a saved adapter: the weights in "
                f"{config.saved.folder} were trained with {trained!r}. Load it as it is, or make a new adapter."
            )
    if selection is None:
        return
    modules = next((layer for layer in layers if layer.kind == "modules"), None)
    if modules is not None:
        raise OrdMoEModelError(
            f"expert_selection is for experts in stacks, and those of {modules.experts_name} "
            f"({type(modules.experts).__name__}) are modules of their own. Leave it unset."
        )
    names = {str(layer.index) for layer in layers}
    if selection.keys() != names:
        outside, absent = (sorted(map(int, part)) for part in (selection.keys() - names, names - selection.keys()))
        wrong = f"has the layers {outside}" if outside else f"lacks the layers {absent}"
        raise OrdMoEConfigError(
            f"expert_selection {wrong}, and this model has the MoE layers 0 to {len(layers) - 1}. Name each of them; "
            "an empty list is for one without LoRA on its experts."
        )
    for layer in layers:
        others = [expert for expert in selection[str(layer.index)] if not 0 <= expert < layer.num_experts]
        if others:
            raise OrdMoEConfigError(
                f"expert_selection has expert {others[0]} in layer {layer.index}, whose experts are 0 to "
                f"{layer.num_experts - 1}."
            )


def others_of(model: nn.Module, config: Any, adapter_name: str) -> list[tuple[nn.Module, torch.Tensor]]:
    """PEFT's layers of stacks, each with the indices of the experts that `config.expert_selection` leaves out."""
    stacks = {
        f"{layer.experts_name}.{name}": config.expert_selection[str(layer.index)]
        for layer in MoEModel.of(model).layers
        for name in layer.projections
    }
    found = [(module, stacks[name]) for name, module in adapted_modules(model) if name in stacks]
    return [
        (module, torch.tensor([expert for expert in range(module.num_experts) if expert not in chosen]))
        for module, chosen in found
        if adapter_name in module.lora_A
    ]


@torch.no_grad()
def clear_(module: nn.Module, adapter_name: str, experts: torch.Tensor) -> None:
    """Set the factors of these experts (`torch.Tensor` of shape `(P,)`) in one of PEFT's layers of stacks to zero.

    Factors that are shared out over processes are left as they are.
    """
    A, B = (factors[adapter_name].weight for factors in (module.lora_A, module.lora_B))
    if isinstance(A, DTensor) or hasattr(A, "ds_shape"):
        return
    A.view(module.num_experts, -1, A.shape[1]).index_fill_(0, experts.to(A.device), 0)
    B.view(len(B), -1, module.num_experts).index_fill_(2, experts.to(B.device), 0)
