"""Sections e and a part of g: steps of the real trainer on layers of real width, their time, and memory by the plan."""

import gc
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from ordmoe_peft.tools.plan.plan import MemoryPlan, plan_memory
from ordmoe_peft.tools.plan.settings import PlanSettings

from ..trainers import Clock, MeasuringTrainer, trainer_on
from .models import R, config_of, packed_model, quantization, random_batch
from .rows import Row, Size, tried, verdict


# What the plan may be off by, and how far losses of both kinds of passes may be apart.
PLAN_OFF, LOSSES_APART = 0.15, 0.02
PASSES = ("batched", "sequential")
GIB = 2**30


def train(size: Size, device: str) -> Iterator[Row]:
    """Section e: packed experts, gradient checkpointing, three tiers at once and one after another."""
    model = packed_model(size, device)
    start = {name: weight.detach().clone() for name, weight in trained(model).items()}
    losses: dict[str, list[float]] = {}
    for passes in PASSES:
        for name, weight in trained(model).items():
            weight.data.copy_(start[name])
            weight.grad = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield tried(passes, partial(steps, model, passes, size, device, losses))
    if len(losses) == len(PASSES):
        apart = max(abs(mine / its - 1) for mine, its in zip(*losses.values(), strict=True))
        said = "; ".join(f"{passes} {', '.join(f'{x:.4f}' for x in of)}" for passes, of in losses.items())
        yield Row(
            "losses of both", said, verdict(apart < LOSSES_APART, f"they are {apart:.1%} apart"), {"apart": apart}
        )


def trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def steps(model: PeftModel, passes: str, size: Size, device: str, losses: dict[str, list[float]]) -> Row:
    """Steps of two micro-batches, the first of which warms up."""
    settings = PlanSettings(
        quantization=quantization(),
        r=R,
        tier_passes=passes,
        batch_size=size.batch[0],
        sequence_length=size.batch[1],
        device=device,
    )
    with tempfile.TemporaryDirectory() as folder:
        changes = {"max_steps": 1 + size.repetitions, "logging_steps": 1, "learning_rate": 1e-4}
        trainer = trainer_on(model, random_batch(size), settings, folder, MeasuringTrainer, **changes)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    losses[passes] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = statistics.median(clock.seconds[1:])
    plan = plan_memory(config_of(size, dtype=torch.bfloat16), settings)
    said, off, numbers = memory_by_plan(trainer.peaks[-1], plan, device)
    return Row(
        passes,
        f"{seconds:.3f} s a step of two micro-batches; {said}",
        verdict(abs(off) <= PLAN_OFF, f"the plan is off by {off:+.0%}"),
        {"seconds": seconds} | numbers,
    )


def memory_by_plan(peak: int, plan: MemoryPlan, device: str) -> tuple[str, float, dict[str, float]]:
    """What was taken beside what was planned: on a card all of it, on a CPU activations alone."""
    if device == "cpu":
        off = plan.activations.peak / peak - 1
        said = f"activations took {peak / 2**20:.1f} MiB, planned {plan.activations.peak / 2**20:.1f} ({off:+.0%})"
        return said, off, {"peak": peak, "planned": plan.activations.peak}
    # Since the trainer reset them at the last micro-batch; the optimizer's step is in.
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    off = plan.total / allocated - 1
    said = (
        f"allocated {allocated / GIB:.2f} GiB, reserved {reserved / GIB:.2f}, planned {plan.total / GIB:.2f} "
        f"({off:+.0%}); activations took {peak / GIB:.2f}, planned {plan.activations.peak / GIB:.2f}"
    )
    numbers = {"allocated": allocated, "reserved": reserved, "planned": plan.total}
    return said, off, numbers | {"peak": peak, "planned_activations": plan.activations.peak}


def train_in_fp16(size: Size, device: str) -> Row:
    """Five steps with a gradient scaler, which accelerate has on a card alone."""
    case = "fp16 with a gradient scaler"
    if device == "cpu":
        return Row(case, "", "not available: accelerate scales no gradients on a CPU")
    model = packed_model(size, device, torch.float16, layers=2)
    settings = PlanSettings(batch_size=size.batch[0], tier_passes="batched", device=device)
    before = {name: weight.detach().float().clone() for name, weight in trained(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"max_steps": 5, "logging_steps": 1, "bf16": False, "fp16": True}
        trainer = trainer_on(model, random_batch(size), settings, folder, **changes)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = sum(not torch.equal(weight.float(), before[name]) for name, weight in trained(model).items())
    is_right = moved > 0 and all(torch.isfinite(torch.tensor(losses)))
    return Row(
        case,
        f"losses {', '.join(f'{loss:.4f}' for loss in losses)}; {moved} of {len(before)} weights moved; "
        f"scale {trainer.accelerator.scaler.get_scale():.0f}",
        verdict(is_right, "losses are not finite, or no weight moved"),
    )
