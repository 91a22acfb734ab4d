"""Changes that make training take less memory."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ...quantization.config import MoeBitsAndBytesConfig
from .plan import MemoryPlan, plan_memory
from .settings import PlanSettings


# Shorter rows than this are not suggested.
LEAST_SEQUENCE_LENGTH = 256


@dataclass(frozen=True)
class Suggestion:
    """A change that takes less: its options, and what training takes with it and those before it."""

    options: str
    settings: PlanSettings
    plan: MemoryPlan


def suggest(config: PretrainedConfig, settings: PlanSettings, plan: MemoryPlan, limit: int) -> Iterator[Suggestion]:
    """Changes that make training take less, each on top of those before it, until it fits into `limit` bytes."""
    for place in range(len(_changes(settings))):
        if plan.total <= limit:
            return
        is_possible, options, changes = _changes(settings)[place]
        if not is_possible:
            continue
        lighter = replace(settings, **changes)
        lighter_plan = plan_memory(config, lighter)
        if lighter_plan.total < plan.total:
            settings, plan = lighter, lighter_plan
            yield Suggestion(options, settings, plan)


def _changes(now: PlanSettings) -> list[tuple[bool, str, dict[str, Any]]]:
    """Whether there is something to change, the options of `ordmoe train` for it, and what these make of `now`.

    First those that cost the least: time only, then precision of the optimizer and of scales, then what is learnt from.
    """
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=now.dtype)
    in_4_bits = replace(now, quantization=nf4)
    without_bf16 = "" if in_4_bits.autocast_used == now.autocast else " --bf16 false"
    nested = copy.deepcopy(now.quantization or nf4)
    can_nest = now.quantization is not None and not nested.bnb_4bit_use_double_quant and not now.is_stored_packed
    nested.bnb_4bit_use_double_quant = True
    accumulation = f"--gradient_accumulation_steps (x {now.batch_size})"
    length = now.sequence_length // 2
    least_length = max(LEAST_SEQUENCE_LENGTH, now.images_per_sample * (now.image_tokens + 2) + 1)
    shorter = (length >= least_length, f"--max_length {length}", {"sequence_length": length})
    return [
        (
            now.quantization is None,
            f"--load_in_4bit true{without_bf16}",
            {"quantization": nf4, "autocast": in_4_bits.autocast_used},
        ),
        (not now.gradient_checkpointing, "--gradient_checkpointing true", {"gradient_checkpointing": True}),
        (now.tiers_at_once > 1, "--tier_passes sequential", {"tier_passes": "sequential"}),
        (now.batch_size > 1, f"--per_device_train_batch_size 1 {accumulation}", {"batch_size": 1}),
        (can_nest, "--use_bnb_nested_quant true", {"quantization": nested}),
        ("8bit" not in now.optimizer, "--optim paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}),
        shorter,
        shorter,
        (now.r >= 8, f"--lora_r {now.r // 2}", {"r": now.r // 2}),
    ]
