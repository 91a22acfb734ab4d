"""Section f: packed experts in RAM beside the same on the device: gradients, seconds, and copies."""

import gc
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile

from ordmoe_peft import MoeBitsAndBytesConfig, tier_routing
from ordmoe_peft.moe_model import MoEModel

from ..measuring import by_turns
from .models import packed_model, random_batch
from .rows import MEASURED, Row, Size, verdict


RESIDENT, IN_RAM = "on the device", "in RAM"
GIB = 2**30


def compare(size: Size, device: str) -> Iterator[Row]:
    if "offload_experts" not in inspect.signature(MoeBitsAndBytesConfig).parameters:
        yield Row("experts in RAM", "", "not available: MoeBitsAndBytesConfig has no offload_experts")
        return
    models, held = {}, {}
    for name in (RESIDENT, IN_RAM):
        before = allocated(device)
        models[name] = prepared(packed_model(size, device, offload_experts=name == IN_RAM))
        held[name] = allocated(device) - before
    if device == "cuda":
        figure = ", ".join(f"{name} {held[name] / GIB:.2f} GiB" for name in models)
        yield Row("the model, on the device", figure, verdict(held[IN_RAM] < held[RESIDENT], "as much"), held)
    batch = random_batch(size, device)
    with deterministic():
        row = equality(models, batch)
    yield row
    del batch["labels"]
    yield from speed(models, batch, size, device)


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same each time where torch has such; what is not written to holds NaN."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def prepared(model: PeftModel) -> PeftModel:
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def allocated(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def equality(models: dict[str, PeftModel], batch: dict[str, torch.Tensor]) -> Row:
    """Loss and gradients under three tiers; of the resident model twice, since a card may not repeat itself."""
    batch = {name: value[:, :512] for name, value in batch.items()}  # three rows of logits are to fit beside two models
    runs = [gradients(models[name], batch) for name in (RESIDENT, RESIDENT, IN_RAM, IN_RAM)]
    differing = [sum(not torch.equal(mine, its) for mine, its in zip(runs[0], run, strict=True)) for run in runs[1:]]
    repeated, first, second = differing
    return Row(
        "loss and gradients",
        f"of {len(runs[0])} tensors {repeated} differ between two runs on the device; {first} and {second} in RAM",
        verdict(first + second == 0 or repeated > 0, "experts in RAM give other numbers"),
        {"repeated": repeated, "in_ram": first, "in_ram_again": second},
    )


def gradients(model: PeftModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    rows = len(batch["input_ids"])
    repeated = {name: value.repeat(3, 1) for name, value in batch.items()}
    model.zero_grad()
    with tier_routing(model, [1] * rows + [2] * rows + [3] * rows):
        loss = model(**repeated, use_cache=False).loss
        loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.requires_grad)]


def speed(models: dict[str, PeftModel], batch: dict[str, torch.Tensor], size: Size, device: str) -> Iterator[Row]:
    """Of a forward and backward without a loss on the vocabulary, in which copies hide worst."""

    def step(model: PeftModel) -> None:
        model.zero_grad()
        text = model.get_base_model().model
        text(**batch, use_cache=False).last_hidden_state.sum().backward()

    times = by_turns(
        {name: lambda model=model: step(model) for name, model in models.items()}, size.repetitions, device
    )
    ratio = times[IN_RAM].over(times[RESIDENT])
    figure = "; ".join(f"{name} {of}" for name, of in times.items())
    numbers = {name: of.median for name, of in times.items()}
    yield Row("forward and backward", f"{figure}; {ratio:.2f} times as long in RAM", MEASURED, numbers)
    if device == "cpu":
        return
    copies, seconds = copies_of(models[IN_RAM], step)
    layers = MoEModel.of(models[IN_RAM]).layers
    stacks = [getattr(layers[0].experts, name) for name in layers[0].projections]
    of_layer = sum(stack.nbytes + stack.quant_state.absmax.nbytes for stack in stacks)
    most = 2 * len(layers) - 4
    waited = numbers[IN_RAM] - numbers[RESIDENT]
    yield Row(
        "copies",
        f"{copies} large ones in {1e3 * seconds:.1f} ms, {most} layers of {of_layer / 2**20:.0f} MiB: "
        f"{most * of_layer / 1e9 / max(seconds, 1e-9):.1f} GB/s; {1 - waited / max(seconds, 1e-9):.0%} of it hidden",
        verdict(copies <= 4 * most, f"more than bytes and scales of two stacks of {most} layers"),
        {"copies": copies, "seconds": seconds, "bytes": most * of_layer},
    )


def copies_of(model: PeftModel, step: Any) -> tuple[int, float]:
    """How many copies to the device took more than 20 microseconds, and the seconds of all of these."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(model)
    copies = [event.device_time for event in profiler.events() if event.name.startswith("Memcpy HtoD")]
    large = [microseconds for microseconds in copies if microseconds > 20]
    return len(large), sum(large) / 1e6
