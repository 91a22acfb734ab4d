"""Put together what training takes of a card's memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from ...experts.tuning import WorkSizes
from ...moe_model import MoELayer, MoEModel
from ...quantization.memory_by_role import CensusRow, quantization_census
from ...quantization.ring import aligned
from ...quantization.storage import is_packed
from ...training.optimizer_states import optimizer_bytes
from ...training.pass_memory import PassMemory
from .activations import Activations, estimate_activations
from .optimizer_step import step_temporaries
from .settings import PlanSettings
from .weights import build_meta_model


# Layers whose packed experts the card holds where all others are in RAM: the places of `quantization/ring.py`.
NUM_SLOTS = 2


@dataclass(frozen=True)
class ExpertsInRam:
    """Packed experts in pinned RAM, of which slots on the card hold what is worked on and what comes next.

    Args:
        host (`int`): bytes that are in RAM rather than on the card.
        pinned (`int`): bytes of RAM that they take: torch rounds each pinned tensor up to a power of two.
        slots (`int`): bytes of the card.
        copied (`int`): bytes that are copied to the card in a pass, a forward and its backward.
    """

    host: int
    pinned: int
    slots: int
    copied: int


@dataclass(frozen=True)
class HeldMemory:
    """What training holds all the time, in bytes.

    Args:
        weights (`list` of [`~ordmoe_peft.quantization.memory_by_role.CensusRow`]): the base, by role and dtype.
        in_ram ([`ExpertsInRam`], *optional*): those of `weights` that are not on the card.
        trainable (`int`): the adapter's weights, how many.
        adapter (`int`), gradients (`int`), optimizer (`int`): the adapter, its gradients, the optimizer's states.
        temporaries (`int`): what a step of the optimizer holds beside its states, when activations are gone.
        moe (`dict`): number of MoE layers, E and K.
    """

    weights: list[CensusRow]
    in_ram: ExpertsInRam | None
    trainable: int
    adapter: int
    gradients: int
    optimizer: int
    temporaries: int
    moe: dict[str, int]

    @property
    def base(self) -> int:
        """What the card holds of the base."""
        everything = sum(row.bytes for row in self.weights)
        return everything if self.in_ram is None else everything - self.in_ram.host + self.in_ram.slots

    @property
    def held(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer


@dataclass(frozen=True)
class MemoryPlan(HeldMemory):
    """What training takes, in bytes.

    Args:
        activations ([`Activations`]): what one forward and backward holds beside.
        matrices (`int`, *optional*): the most of experts' matrices that are unpacked at a time, or one matrix where
            that is larger; `None` where there is always one.
        others: see [`HeldMemory`].
    """

    activations: Activations
    matrices: int | None

    @property
    def beyond_activations(self) -> int:
        """What the optimizer's step takes more than activations took."""
        return max(self.temporaries - self.activations.peak, 0)

    @property
    def total(self) -> int:
        return self.held + self.activations.peak + self.beyond_activations

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, sizes in bytes."""
        return {
            "weights": [vars(row) | {"bits": row.bits} for row in self.weights],
            "in_ram": None if self.in_ram is None else vars(self.in_ram),
            "trainable_parameters": self.trainable,
            "base": self.base,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "optimizer_temporaries": self.temporaries,
            "activations": {**vars(self.activations), "peak": self.activations.peak},
            "matrices_at_a_time": self.matrices,
            "total": self.total,
            **self.moe,
        }


@dataclass(frozen=True)
class MetaModel:
    """What is counted of a model without numbers.

    Args:
        weights, moe: see [`HeldMemory`].
        stacks (`list` of `list` of `int`): for each MoE layer with packed stacks the bytes of what would go to RAM.
        trainable (`list` of `torch.Tensor`): the adapter.
    """

    weights: list[CensusRow]
    stacks: list[list[int]]
    trainable: list[torch.Tensor]
    moe: dict[str, int]


@dataclass
class Traces:
    """What was counted and traced of one model, for further plans of it: most of their time goes into that."""

    models: dict[str, MetaModel] = field(default_factory=dict)
    # Models that were counted and not yet traced, which uses them up.
    built: dict[str, PeftModel] = field(default_factory=dict)
    # States, and what a step makes beside them.
    optimizers: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    activations: dict[tuple[str, WorkSizes], Activations] = field(default_factory=dict)


def plan_memory(config: PretrainedConfig, settings: PlanSettings, traces: Traces | None = None) -> MemoryPlan:
    """What training a model of `config` takes.

    Args:
        config ([`~transformers.PretrainedConfig`]), settings ([`PlanSettings`]): the model, and how it is trained.
        traces ([`Traces`], *optional*): of this model; what is not in them is added.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: the settings do not fit the model, e.g. it has no MoE layers, or
            C·K > E.
    """
    traces = traces or Traces()
    held = count_held(config, settings, traces)
    sizes = settings.work_sizes(held.base + held.adapter)
    to_trace = settings.for_trace()
    key = str(to_trace), sizes
    if key not in traces.activations:
        model = traces.built.pop(str(settings.for_weights()), None) or _build(config, to_trace)
        traces.activations[key] = estimate_activations(model, to_trace, sizes)
    return MemoryPlan(**vars(held), activations=traces.activations[key], matrices=sizes.matrices)


def count_held(config: PretrainedConfig, settings: PlanSettings, traces: Traces) -> HeldMemory:
    """What training holds whatever the rows are, the least that its plan's total can be. See [`plan_memory`]."""
    key, name = str(settings.for_weights()), settings.optimizer
    if key not in traces.models:
        traces.built[key] = model = _build(config, settings.for_weights())
        traces.models[key] = _count(model)
    meta = traces.models[key]
    if (key, name) not in traces.optimizers:
        traces.optimizers[key, name] = optimizer_bytes(name, meta.trainable), step_temporaries(name, meta.trainable)
    adapter = sum(parameter.nbytes for parameter in meta.trainable)
    optimizer, temporaries = traces.optimizers[key, name]
    return HeldMemory(
        weights=meta.weights,
        in_ram=_in_ram(meta.stacks) if settings.offload_experts else None,
        trainable=sum(parameter.numel() for parameter in meta.trainable),
        adapter=adapter,
        gradients=adapter,
        optimizer=optimizer,
        temporaries=temporaries,
        moe=meta.moe,
    )


def _build(config: PretrainedConfig, settings: PlanSettings) -> PeftModel:
    return _with_adapter(build_meta_model(config, settings.dtype, settings.quantization), settings)


def _count(model: PeftModel) -> MetaModel:
    layers = MoEModel.of(model).layers
    return MetaModel(
        weights=[row for row in quantization_census(model).rows if row.role != "adapter"],
        stacks=list(filter(None, map(_packed_sizes, layers))),
        trainable=[parameter for parameter in model.parameters() if parameter.requires_grad],
        moe={"moe_layers": len(layers), "num_experts": layers[0].num_experts, "top_k": layers[0].top_k},
    )


def _packed_sizes(layer: MoELayer) -> list[int]:
    """Bytes of what of a layer goes to RAM: each packed stack's bytes and scales."""
    return [
        part.nbytes for stack in layer.stacks.values() if is_packed(stack) for part in (stack, stack.quant_state.absmax)
    ]


def _in_ram(stacks: list[list[int]]) -> ExpertsInRam:
    """Forward and backward each copy all layers but those that the slots hold when they begin."""
    host, num_layers = sum(map(sum, stacks)), len(stacks)
    return ExpertsInRam(
        host=host,
        pinned=sum(1 << (size - 1).bit_length() for sizes in stacks for size in sizes),
        slots=NUM_SLOTS * max((sum(map(aligned, sizes)) for sizes in stacks), default=0),
        copied=2 * max(num_layers - NUM_SLOTS, 0) * host // max(num_layers, 1),
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
