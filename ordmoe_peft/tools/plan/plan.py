"""Put together what training takes of a card's memory."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from ...moe_model import MoEModel
from ...quantization.memory_by_role import CensusRow, quantization_census
from ...training.pass_memory import PassMemory
from .activations import Activations, estimate_activations
from .optimizers import optimizer_bytes
from .settings import PlanSettings
from .weights import build_meta_model


@dataclass(frozen=True)
class MemoryPlan:
    """What training takes, in bytes.

    Args:
        weights (`list` of [`~ordmoe_peft.quantization.memory_by_role.CensusRow`]): the base, by role and dtype.
        trainable (`int`): the adapter's weights, how many.
        adapter (`int`), gradients (`int`), optimizer (`int`): the adapter, its gradients, the optimizer's states.
        activations ([`Activations`]): what one forward and backward holds beside.
        moe (`dict`): number of MoE layers, E and K.
    """

    weights: list[CensusRow]
    trainable: int
    adapter: int
    gradients: int
    optimizer: int
    activations: Activations
    moe: dict[str, int]

    @property
    def base(self) -> int:
        """All weights of the base."""
        return sum(row.bytes for row in self.weights)

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations.peak

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, sizes in bytes."""
        return {
            "weights": [vars(row) | {"bits": row.bits} for row in self.weights],
            "trainable_parameters": self.trainable,
            "base": self.base,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": {**vars(self.activations), "peak": self.activations.peak},
            "total": self.total,
            **self.moe,
        }


def plan_memory(config: PretrainedConfig, settings: PlanSettings) -> MemoryPlan:
    """What training a model of `config` takes.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: the settings do not fit the model, e.g. it has no MoE layers, or
            C·K > E.
    """
    base = build_meta_model(config, settings.dtype, settings.quantization)
    layers = MoEModel.of(base).layers
    census = quantization_census(base)
    model = _with_adapter(base, settings)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = sum(parameter.nbytes for parameter in trainable)
    return MemoryPlan(
        weights=census.rows,
        trainable=sum(parameter.numel() for parameter in trainable),
        adapter=adapter,
        gradients=adapter,
        optimizer=optimizer_bytes(settings.optimizer, trainable),
        activations=estimate_activations(model, settings),
        moe={"moe_layers": len(layers), "num_experts": layers[0].num_experts, "top_k": layers[0].top_k},
    )


def _with_adapter(base: PreTrainedModel, settings: PlanSettings) -> PeftModel:
    """The model as the trainer holds it."""
    model = get_peft_model(base, settings.adapter_config(), low_cpu_mem_usage=True)
    if settings.quantization is not None:
        # As TRL does on quantised bases, and the trainer undoes for a gradient scaler.
        dtype = torch.float32 if settings.autocast_used == torch.float16 else torch.bfloat16
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


def tokens_at_once(plan: MemoryPlan, settings: PlanSettings, limit: int) -> int | None:
    """Most tokens of a batch that the trainer runs under all tiers at once, by its own rule for `tier_passes="auto"`.

    Args:
        plan ([`MemoryPlan`]), settings ([`PlanSettings`]): what its first batch takes.
        limit (`int`): what the card has for training, in bytes.

    Returns:
        `int`, *optional*: 0 where tiers always run one after another; `None` where there is nothing to decide.
    """
    passes = len(settings.tiers_run())
    if settings.tier_passes != "auto" or passes == 1:
        return None
    memory = PassMemory(
        peak=plan.activations.peak,
        free=max(limit - plan.base - plan.adapter, 0),
        to_come=plan.gradients + plan.optimizer,
    )
    return memory.max_tokens(settings.batch_size * settings.sequence_length, passes)
