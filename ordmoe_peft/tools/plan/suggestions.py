"""Changes that make training take less memory."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ...quantization.config import MoeBitsAndBytesConfig
from .plan import MemoryPlan, Traces, count_held, plan_memory
from .settings import PlanSettings


# Shorter rows than this are not suggested.
LEAST_SEQUENCE_LENGTH = 256


@dataclass(frozen=True)
class Suggestion:
    """A change that takes less: its options, and what training takes with it and those before it."""

    options: str
    settings: PlanSettings
    plan: MemoryPlan


def suggest(
    config: PretrainedConfig, settings: PlanSettings, plan: MemoryPlan, limit: int, traces: Traces | None = None
) -> Iterator[Suggestion]:
    """Changes that make training take less, each on top of those before it, until it fits into `limit` bytes.

    See [`~ordmoe_peft.tools.plan.plan.plan_memory`] for `traces`.
    """
    traces = traces or Traces()
    for place in range(len(_changes(settings))):
        if plan.total <= limit:
            return
        is_possible, options, changes = _changes(settings)[place]
        if not is_possible:
            continue
        lighter = replace(settings, **changes)
        lighter_plan = plan_memory(config, lighter, traces)
        if lighter_plan.total < plan.total:
            settings, plan = lighter, lighter_plan
            yield Suggestion(options, settings, plan)


def fewest_changes(
    config: PretrainedConfig, settings: PlanSettings, limit: int, traces: Traces | None = None
) -> Suggestion | None:
    """The fewest changes with which training fits into `limit` bytes, none where it fits as it is.

    Of as many changes, those come first that cost less. `None` where all together do not suffice. See
    [`~ordmoe_peft.tools.plan.plan.plan_memory`] for `traces`.
    """
    traces = traces or Traces()

    def changed(places: Sequence[int]) -> tuple[list[int], Suggestion | None]:
        """Which of the changes at these places are possible, one after the other, and their plan, if it fits."""
        now, made, options = settings, list[int](), dict[str, str]()
        for place in places:
            is_possible, option, changes = _changes(now)[place]
            if is_possible:
                now, options[option.split()[0]] = replace(now, **changes), option  # the last of an option counts
                made.append(place)
        if count_held(config, now, traces).held > limit:
            return made, None  # without a trace, which takes longer
        plan = plan_memory(config, now, traces)
        return made, Suggestion(" ".join(options.values()), now, plan) if plan.total <= limit else None

    possible, everything = changed(range(len(_changes(settings))))
    if everything is None:
        return None
    for number in range(len(possible)):
        for places in itertools.combinations(possible, number):
            made, way = changed(places)
            if way is not None and len(made) == number:
                return way
    return everything


def _changes(now: PlanSettings) -> list[tuple[bool, str, dict[str, Any]]]:
    """Whether there is something to change, the options of `ordmoe train` for it, and what these make of `now`.

    First those that cost the least: a little time, then precision of the optimizer and of scales, then much time, then
    what is learnt from.
    """
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=now.dtype)
    in_4_bits = replace(now, quantization=nf4)
    without_bf16 = "" if in_4_bits.autocast_used == now.autocast else " --bf16 false"
    quantization = now.quantization or nf4
    packed = replace(now, quantization=quantization)
    nested = packed.with_quantization(bnb_4bit_use_double_quant=True).quantization
    can_nest = now.quantization is not None and not quantization.bnb_4bit_use_double_quant and not now.is_stored_packed
    in_ram = packed.with_quantization(offload_experts=True).quantization
    # A base that is stored in 4 bits takes it with these.
    offload = "--load_in_4bit true --offload_experts true" if now.is_stored_packed else "--offload_experts true"
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
        (now.quantization is not None and not now.offload_experts, offload, {"quantization": in_ram}),
        shorter,
        shorter,
        (now.r >= 8, f"--lora_r {now.r // 2}", {"r": now.r // 2}),
    ]
