"""Put together what training takes, and what would make it take less."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig

from ...adapter.config import OrdMoEConfig
from ...errors import OrdMoEConfigError
from ...moe_model import find_moe_layers
from ...objectives.advantages import tier_advantages
from ...objectives.registry import OBJECTIVES
from ...quantization.config import MoeBitsAndBytesConfig
from ...quantization.memory_by_role import CensusRow, quantization_census
from ...training.arguments import CHOICES
from ...training.pass_memory import PassMemory
from .activations import Activations, StepShape, estimate_activations
from .optimizers import OPTIMIZERS, optimizer_bytes
from .weights import build_meta_model


TIER_PASSES = CHOICES["tier_passes"]
# Shorter rows than this are not suggested.
LEAST_SEQUENCE_LENGTH = 256


@dataclass(frozen=True)
class PlanSettings:
    """How a model is trained.

    Args:
        dtype (`torch.dtype`, defaults to bf16): that of unquantised weights.
        quantization ([`MoeBitsAndBytesConfig`], *optional*): 4-bit loading.
        is_stored_packed (`bool`, defaults to `False`): the checkpoint is in 4 bits already, so `quantization` is fixed.
        r (`int`, defaults to 16), targets (`tuple[str, ...]`, defaults to router and experts): the adapter's.
        num_tiers (`int`, defaults to 3), objective (`str`, defaults to `"erl"`), rewards (`tuple[float, ...]`,
            *optional*), advantages (`str`, defaults to `"zscore"`): decide which tiers are run.
        tier_passes (`str`, defaults to `"auto"`): `"batched"`, the rows of all tiers in one forward, each with a prompt
            of its own; `"sequential"`, one tier after another; or `"auto"`, which is planned as `"sequential"`: the
            trainer begins so and changes where half of what is free suffices, see [`tokens_at_once`].
        batch_size (`int`, defaults to 8): samples at a time on the card.
        sequence_length (`int`, defaults to 1024): tokens of each, image tokens included.
        images_per_sample (`int`, defaults to 0), image_tokens (`int`, defaults to 0): see [`StepShape`].
        gradient_checkpointing (`bool`, defaults to `True`).
        optimizer (`str`, defaults to `"adamw_torch_fused"`): a key of [`OPTIMIZERS`].
        autocast (`torch.dtype`, *optional*): dtype of mixed precision, see [`PlanSettings.autocast_used`].
        device (`str`, defaults to `"cuda"`): see [`StepShape`].

    Raises:
        [`OrdMoEConfigError`]: a value that cannot work.
    """

    dtype: torch.dtype = torch.bfloat16
    quantization: MoeBitsAndBytesConfig | None = None
    is_stored_packed: bool = False
    r: int = 16
    targets: tuple[str, ...] = ("router", "experts")
    num_tiers: int = 3
    objective: str = "erl"
    rewards: tuple[float, ...] | None = None
    advantages: str = "zscore"
    tier_passes: str = "auto"
    batch_size: int = 8
    sequence_length: int = 1024
    images_per_sample: int = 0
    image_tokens: int = 0
    gradient_checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    autocast: torch.dtype | None = torch.bfloat16
    device: str = "cuda"

    def __post_init__(self):
        for name in ("r", "num_tiers", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise OrdMoEConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("images_per_sample", "image_tokens"):
            if getattr(self, name) < 0:
                raise OrdMoEConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        choices = {"tier_passes": TIER_PASSES, "objective": tuple(OBJECTIVES), "optimizer": tuple(OPTIMIZERS)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise OrdMoEConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")

    def adapter_config(self) -> OrdMoEConfig:
        """The adapter's configuration."""
        rewards = None if self.rewards is None else list(self.rewards)
        return OrdMoEConfig(
            r=self.r,
            targets=list(self.targets),
            num_tiers=self.num_tiers,
            rewards=rewards,
            advantages=self.advantages,
        )

    def tiers_run(self) -> list[int]:
        """The tiers that a step runs with gradient, from 1: tier 1, and those that the objective looks at."""
        if self.num_tiers == 1:
            return [1]
        advantages = tier_advantages(self.rewards, self.num_tiers, self.advantages)
        return sorted({1, *OBJECTIVES[self.objective].active_tiers(advantages)})

    @property
    def autocast_used(self) -> torch.dtype | None:
        """The dtype of mixed precision; `None` where training would end with an error under it.

        Autocast takes one 16-bit dtype, and layers in 4 bits give out that of the weights, so fp16 and bf16 would meet:
        "Unexpected floating ScalarType in at::autocast::prioritize".
        """
        is_refused = self.quantization and {self.dtype, self.autocast} == {torch.float16, torch.bfloat16}
        return None if is_refused else self.autocast

    @property
    def tiers_at_once(self) -> int:
        """Tiers whose rows are in one forward."""
        return len(self.tiers_run()) if self.tier_passes == "batched" else 1

    @property
    def rows(self) -> int:
        """Rows of the largest forward."""
        return self.batch_size * self.tiers_at_once

    def step_shape(self) -> StepShape:
        """The largest forward."""
        return StepShape(
            samples=self.batch_size,
            sequence_length=self.sequence_length,
            tiers=self.tiers_at_once,
            images_per_row=self.images_per_sample,
            image_tokens=self.image_tokens,
            encodes_first=self.num_tiers > 1,
            gradient_checkpointing=self.gradient_checkpointing,
            autocast=self.autocast_used,
            device=self.device,
        )


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


@dataclass(frozen=True)
class Suggestion:
    """A change that takes less: its options, and what training takes with it and those before it."""

    options: str
    settings: PlanSettings
    plan: MemoryPlan


def plan_memory(config: PretrainedConfig, settings: PlanSettings) -> MemoryPlan:
    """What training a model of `config` takes.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: the settings do not fit the model, e.g. it has no MoE layers, or
            C·K > E.
    """
    model = build_meta_model(config, settings.dtype, settings.quantization)
    layers = find_moe_layers(model)
    census = quantization_census(model)
    model = _with_adapter(model, settings)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = sum(parameter.nbytes for parameter in trainable)
    return MemoryPlan(
        weights=census.rows,
        trainable=sum(parameter.numel() for parameter in trainable),
        adapter=adapter,
        gradients=adapter,
        optimizer=optimizer_bytes(settings.optimizer, trainable),
        activations=estimate_activations(model, settings.step_shape()),
        moe={"moe_layers": len(layers), "num_experts": layers[0].num_experts, "top_k": layers[0].top_k},
    )


def _with_adapter(model: Any, settings: PlanSettings) -> PeftModel:
    """The model as the trainer holds it."""
    model = get_peft_model(model, settings.adapter_config(), low_cpu_mem_usage=True)
    if settings.quantization is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does on quantised bases
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
    memory = PassMemory(peak=plan.gradients + plan.activations.peak, free=max(limit - plan.base - plan.adapter, 0))
    return memory.max_tokens(settings.batch_size * settings.sequence_length, passes)


# -------------------------------------------------------------------------------------------------------- suggestions
def suggest(config: PretrainedConfig, settings: PlanSettings, plan: MemoryPlan, limit: int) -> Iterator[Suggestion]:
    """Changes that make training take less, each on top of those before it, until it fits into `limit` bytes.

    First those that cost the least: time only, then precision of the optimizer and of scales, then what is learnt from.
    """
    for change in CHANGES:
        if plan.total <= limit:
            return
        changed = change(settings)
        if changed is None:
            continue
        options, lighter = changed[0], replace(settings, **changed[1])
        lighter_plan = plan_memory(config, lighter)
        if lighter_plan.total < plan.total:
            settings, plan = lighter, lighter_plan
            yield Suggestion(options, settings, plan)


def _quantise(settings: PlanSettings) -> tuple[str, dict] | None:
    if settings.quantization is not None:
        return None
    lighter = replace(settings, quantization=MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=settings.dtype))
    without = "" if lighter.autocast_used == settings.autocast else " --bf16 false"
    return f"--load_in_4bit true{without}", {"quantization": lighter.quantization, "autocast": lighter.autocast_used}


def _checkpoint(settings: PlanSettings) -> tuple[str, dict] | None:
    if settings.gradient_checkpointing:
        return None
    return "--gradient_checkpointing true", {"gradient_checkpointing": True}


def _one_after_another(settings: PlanSettings) -> tuple[str, dict] | None:
    if settings.tiers_at_once == 1:
        return None
    return "--tier_passes sequential", {"tier_passes": "sequential"}


def _batch_of_one(settings: PlanSettings) -> tuple[str, dict] | None:
    if settings.batch_size == 1:
        return None
    more = f"--gradient_accumulation_steps (x {settings.batch_size})"
    return f"--per_device_train_batch_size 1 {more}", {"batch_size": 1}


def _double_quant(settings: PlanSettings) -> tuple[str, dict] | None:
    quantization = copy.deepcopy(settings.quantization)
    if quantization is None or quantization.bnb_4bit_use_double_quant or settings.is_stored_packed:
        return None
    quantization.bnb_4bit_use_double_quant = True
    return "--use_bnb_nested_quant true", {"quantization": quantization}


def _small_optimizer(settings: PlanSettings) -> tuple[str, dict] | None:
    return None if "8bit" in settings.optimizer else ("--optim paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"})


def _shorter(settings: PlanSettings) -> tuple[str, dict] | None:
    length = settings.sequence_length // 2
    if length < max(LEAST_SEQUENCE_LENGTH, settings.images_per_sample * (settings.image_tokens + 2) + 1):
        return None
    return f"--max_length {length}", {"sequence_length": length}


def _lower_rank(settings: PlanSettings) -> tuple[str, dict] | None:
    return None if settings.r < 8 else (f"--lora_r {settings.r // 2}", {"r": settings.r // 2})


CHANGES: tuple[Callable[[PlanSettings], tuple[str, dict] | None], ...] = (
    *(_quantise, _checkpoint, _one_after_another, _batch_of_one, _double_quant, _small_optimizer),
    *(_shorter, _shorter, _lower_rank),
)
