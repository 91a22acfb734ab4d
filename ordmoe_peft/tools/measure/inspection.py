"""Can a model's routing be cut into tiers? Run it on data and see."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import pandas as pd
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ...data.formats import as_prompt_completion
from ...data.generation import evaluation_mode
from ...data.rows import check_texts
from ...data.samples import ProcessingClass, check_counts, prompt_inputs, sample_batches, scoring_inputs
from ...errors import OrdMoEConfigError, OrdMoEDataError
from ...monitoring.health import DEAD_SHARE, LayerHealth
from ...monitoring.router_meter import RouterMeter
from ...tiers.ranking import GROUPINGS
from ...tiers.routing import adapter_config
from ..tables import Format, Table, number, numbers
from .evaluation import model_inputs
from .verdict import reasons_against


# Field of a layer's health → column of the table.
COLUMNS = {
    **{"layer": "layer", "name": "module", "num_experts": "E", "top_k": "K", "dead": "dead", "min_use": "min use"},
    **{"imbalance": "max use", "marginal_entropy": "marginal H", "token_entropy": "token H", "score_std": "score std"},
    **{"gate_mass": "gate mass", "drift_overlap": "overlap", "drift_kl": "KL"},
}
FIGURES = ("min use", "max use", "marginal H", "token H", "score std", "overlap")
LEGEND = (
    f"use: an expert's tokens over the fair share K/E (1 is fair); dead: experts below {DEAD_SHARE:.0%} of it; "
    "H: entropy over ln E, of the mean router distribution and of a token's; score std: spread of a token's router "
    "logits; gate mass: sum of the weights that the router gives each tier's experts, tier 1 first"
)
DRIFT_LEGEND = "; overlap, KL: experts in common with the router without its adapter, and divergence from it in nats"


@dataclass(frozen=True)
class HealthReport:
    """What inspection found.

    Args:
        model (`str`): name of the model.
        num_tokens (`int`): tokens that were counted, padding apart.
        num_tiers (`int`): C that was asked for.
        grouping (`str`): how tiers were cut.
        is_fit (`bool`): whether the routing of all layers was measured and can be cut into C tiers that differ. It does
            not say that ranks carry a signal: see [`~ordmoe_peft.tools.measure.quality.tier_quality`].
        reasons (`list[str]`): what speaks against it, a sentence each.
        layers (list of [`~ordmoe_peft.monitoring.health.LayerHealth`]): the layers that were measured. Where C does not
            fit a layer, its tiers are those of the largest C that does.
        unread (`list[str]`): layers that can be held to tiers and not be measured, and why, a sentence each.
    """

    model: str
    num_tokens: int
    num_tiers: int
    grouping: str
    is_fit: bool
    reasons: list[str]
    layers: list[LayerHealth]
    unread: list[str] = field(default_factory=list)

    to_dict = asdict

    def tables(self) -> list[Table]:
        """One table, with a row per layer."""
        frame = pd.DataFrame(self.layers, columns=[one.name for one in fields(LayerHealth)])
        frame["min_use"] = frame["utilisation"].map(min)
        frame, note = frame[list(COLUMNS)].rename(columns=COLUMNS), LEGEND
        if frame["KL"].isna().all():
            frame = frame.drop(columns=["overlap", "KL"])
        else:
            note += DRIFT_LEGEND
        formats: dict[str, Format] = {
            **dict.fromkeys(FIGURES, number),
            "gate mass": numbers,
            "KL": partial(number, digits=4),
        }
        return [Table("Routing by layer", frame, formats, note)]


def inspect_model(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Any,
    *,
    num_tiers: int = 3,
    grouping: str = "uniform",
    batch_size: int = 32,
    seed: int = 0,
) -> HealthReport:
    """Run `model` over samples and judge how its routers spread and rank their experts.

    Args:
        model, processing_class, batch_size: as [`~ordmoe_peft.tools.measure.evaluation.evaluate_tiers`] takes them.
        dataset ([`~datasets.Dataset`]): samples with a `prompt`, and a `completion` if there is one, in TRL's format;
            or whole conversations, or texts.
        num_tiers (`int`, defaults to 3): C that is asked about.
        grouping (`str`, defaults to `"uniform"`): how tiers are cut.
        seed (`int`, defaults to 0): what `random` grouping draws from.

    Raises:
        [`OrdMoEConfigError`]: an unknown grouping, or a number below 1.
        [`OrdMoEDataError`]: the data set has no `prompt`, or no samples.
        [`OrdMoEModelError`]: the model has no MoE layers.
    """
    if grouping not in GROUPINGS:
        raise OrdMoEConfigError(f"grouping must be one of {GROUPINGS}, got {grouping!r}.")
    check_counts(num_tiers=num_tiers, batch_size=batch_size)
    # A conversation may end without an answer.
    columns = [name for name in ("prompt", "completion") if name in dataset.column_names] or ["prompt"]
    dataset = as_prompt_completion(dataset)
    if "prompt" not in dataset.column_names or len(dataset) == 0:
        raise OrdMoEDataError(
            f"Inspection needs samples with a `prompt`; the data set has {len(dataset)} samples with the columns "
            f"{sorted(dataset.column_names)}. Use TRL's prompt-completion, messages or text format."
        )
    check_texts(dataset, columns, "inspection", may_be_empty=True)
    with RouterMeter(model, num_tiers=num_tiers, grouping=grouping, seed=seed) as meter:
        _run(model, processing_class, dataset, batch_size)
    layers = meter.report()
    tier_weights = adapter_config(model).tier_weights
    read = [layer for layer in meter.moe_layers if layer.block_name not in meter.unread]
    reasons = reasons_against(layers, read, meter.unsupported, num_tiers, tier_weights)
    return HealthReport(
        model=model.name_or_path,
        num_tokens=max((layer.num_tokens for layer in layers), default=0),
        num_tiers=num_tiers,
        grouping=grouping,
        is_fit=not reasons and not meter.unread,
        reasons=reasons,
        layers=layers,
        unread=[f"Layer {moe.index}: {meter.unread[moe.block_name]}." for moe in meter.moe_layers if moe not in read],
    )


def _run(model: nn.Module, processing_class: ProcessingClass, dataset: Any, batch_size: int) -> None:
    """Forward every sample through the model without its head, whose logits would be the largest tensor by far."""
    backbone = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    with evaluation_mode(model), tqdm(total=len(dataset), desc="Inspecting", unit="sample") as bar:
        for samples in sample_batches(dataset, batch_size):
            # Prompts with their answers where there are such, else prompts alone.
            parts: dict[Callable[..., Any], list] = {scoring_inputs: [], prompt_inputs: []}
            for sample in samples:
                parts[prompt_inputs if sample.get("completion") is None else scoring_inputs].append(sample)
            for make, part in parts.items():
                if part:
                    inputs = model_inputs(make, part, processing_class, model)
                    inputs.pop("labels", None)
                    backbone(**inputs, use_cache=False)
            bar.update(len(samples))
