"""How a model is trained, as far as memory depends on it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...adapter.config import OrdMoEConfig
from ...errors import OrdMoEConfigError
from ...experts.tuning import ON_CPU, WorkSizes, is_one_kernel, on_gpu, on_gpu_with
from ...objectives.advantages import tier_advantages
from ...objectives.registry import OBJECTIVES
from ...quantization.config import MoeBitsAndBytesConfig
from ...training.arguments import CHOICES
from ...training.optimizer_states import OPTIMIZERS
from .lm_head import tile_bytes


CHOICES_OF = {"tier_passes": CHOICES["tier_passes"], "objective": tuple(OBJECTIVES), "optimizer": tuple(OPTIMIZERS)}


@dataclass(frozen=True)
class PlanSettings:
    """How a model is trained.

    `tier_passes="auto"` is planned as `"sequential"`: the trainer begins so and changes where what is free suffices,
    see [`~ordmoe_peft.tools.plan.plan.tokens_at_once`]. With `"batched"` each tier's rows have a prompt of their own.

    Raises:
        [`OrdMoEConfigError`]: a value that cannot work.
    """

    dtype: torch.dtype = torch.bfloat16  # of unquantised weights
    quantization: MoeBitsAndBytesConfig | None = None  # 4-bit loading
    is_stored_packed: bool = False  # the checkpoint is in 4 bits already, so `quantization` is fixed
    # The adapter's. Its tiers, objective, rewards and advantages decide which tiers are run.
    r: int = 16
    expert_rank: int | str | None = None
    targets: Sequence[str] = ("router", "experts")
    num_tiers: int = 3
    objective: str = "erl"
    rewards: Sequence[float] | None = None
    advantages: str = "zscore"
    tier_passes: str = "auto"
    batch_size: int = 8  # samples at a time on the card
    sequence_length: int = 1024  # tokens of each, all of them used, image tokens included
    images_per_sample: int = 0
    image_tokens: int = 0  # that the language model sees of each image
    gradient_checkpointing: bool = True  # run layers again in backward
    optimizer: str = "adamw_torch_fused"  # a key of OPTIMIZERS
    autocast: torch.dtype | None = torch.bfloat16  # dtype of mixed precision, see `autocast_used`
    # Whose LM head and dense experts are planned: on CPU, TRL's head makes several more copies, and experts run one
    # after another.
    device: str = "cuda"
    compute_capability: float = 8.9  # of a CUDA device: dense experts go another way on 9 and 10
    # What programs can have of the card, in bytes: with little free memory, experts are unpacked in smaller blocks.
    usable: int | None = None

    def __post_init__(self):
        for name in ("r", "num_tiers", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise OrdMoEConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("images_per_sample", "image_tokens"):
            if getattr(self, name) < 0:
                raise OrdMoEConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name, known in CHOICES_OF.items():
            if getattr(self, name) not in known:
                raise OrdMoEConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")

    def adapter_config(self) -> OrdMoEConfig:
        """The adapter's configuration."""
        return OrdMoEConfig(
            r=self.r,
            targets=list(self.targets),
            expert_rank=self.expert_rank,
            num_tiers=self.num_tiers,
            rewards=None if self.rewards is None else list(self.rewards),
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
    def offload_experts(self) -> bool:
        """Whether packed experts stay in RAM."""
        return self.quantization is not None and self.quantization.offload_experts

    def with_quantization(self, **changes: Any) -> "PlanSettings":
        """The same with settings of the 4-bit loading changed."""
        quantization = copy.deepcopy(self.quantization)
        for name, value in changes.items():
            setattr(quantization, name, value)
        return replace(self, quantization=quantization)

    def for_trace(self) -> "PlanSettings":
        """The same where a trace does not differ: whatever the optimizer, the card, and where experts are kept."""
        resident = self.with_quantization(offload_experts=False) if self.offload_experts else self
        return replace(resident, optimizer="sgd", usable=None)

    def for_weights(self) -> "PlanSettings":
        """The same where base and adapter do not differ: whatever the rows, too."""
        return replace(
            self.for_trace(),
            batch_size=1,
            sequence_length=1,
            images_per_sample=0,
            image_tokens=0,
            gradient_checkpointing=True,
            tier_passes="auto",
        )

    @property
    def has_grouped_kernel(self) -> bool:
        """Whether dense experts run through `grouped_mm`, which keeps more for backward."""
        return self.device == "cuda" and is_one_kernel(int(self.compute_capability), self.dtype)

    def work_sizes(self, loaded: int) -> WorkSizes:
        """How much of a layer's experts one operation takes, where `loaded` bytes are on the card when training begins.

        What a process has beside tensors is left out: more is free then, so that more is unpacked at a time.
        """
        if self.device != "cuda":
            return ON_CPU
        return on_gpu() if self.usable is None else on_gpu_with(max(self.usable - loaded, 0))

    @property
    def tiers_at_once(self) -> int:
        """Tiers whose rows are in one forward."""
        return len(self.tiers_run()) if self.tier_passes == "batched" else 1

    @property
    def rows(self) -> int:
        """Rows of the largest forward."""
        return self.batch_size * self.tiers_at_once

    @property
    def logits_bytes(self) -> int:
        """The most that exists of logits at a time."""
        return tile_bytes(self.rows * self.sequence_length, self.autocast_used or self.dtype)
