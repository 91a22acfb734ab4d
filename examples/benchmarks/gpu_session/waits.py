"""Section d: where the host waits for the device, by file and line.

On CUDA torch says so itself (`torch.cuda.set_sync_debug_mode`). On a CPU, where nothing waits, what would wait is told
from the operators that read numbers.
"""

import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

import ordmoe_peft
from ordmoe_peft._compat import TorchDispatchMode
from ordmoe_peft.experts.tuning import on_gpu
from ordmoe_peft.tools.plan.settings import PlanSettings

from ..expert_launches import WAITING_OPERATORS, HostWatch
from ..layers import random_experts
from ..trainers import trainer_on
from .models import packed_model, random_batch
from .one_layer import NF4_DOUBLE, LayerStep
from .rows import MEASURED, Row, Size, tried, verdict


PACKAGE = Path(ordmoe_peft.__file__).parent
# What torch says of a wait (`warn_or_error_on_sync` in `c10/cuda/CUDAFunctions.cpp`).
MESSAGE = "called a synchronizing CUDA operation"


def find_waits(size: Size, device: str) -> Iterator[Row]:
    yield from in_a_layer(size, device)
    yield tried("a token of generation", partial(in_decoding, size, device))
    yield tried("a training step", partial(in_training, size, device))


def in_a_layer(size: Size, device: str) -> Iterator[Row]:
    """Of packed experts as GPUs run them."""
    step = LayerStep(size.layer, random_experts(size.layer, torch.bfloat16, device, NF4_DOUBLE), on_gpu())
    step.both()
    with waits(device) as found:
        y_TH = step.forward()
    yield told("a layer's forward", found, most=1)
    with waits(device) as found:
        step.backward(y_TH)
    yield told("a layer's backward", found, most=0)
    y_TH = checkpoint(step.forward, use_reentrant=False)
    with waits(device) as found:
        step.backward(y_TH)
    yield told("a layer's recompute and backward", found, most=1)


def in_decoding(size: Size, device: str) -> Row:
    """Of a model of two layers, with a cache."""
    model = packed_model(size, device, layers=2).eval().get_base_model()
    ids = random_batch(size, device)["input_ids"][:1, :8]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache)
        with waits(device) as found:
            model(input_ids=ids[:, :1], past_key_values=cache)
    # On a CPU few rows are put in the order of their experts on the host.
    return told("a token of generation", found, most=0 if device == "cuda" else None)


class WatchedStep(TrainerCallback):
    """Notes the waits of the third step, in which everything exists."""

    def __init__(self, device: str):
        self.device, self.found, self.open = device, Counter(), ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.found = self.open.enter_context(waits(self.device))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.open.close()


def in_training(size: Size, device: str) -> Row:
    """Of a model of two layers, under three tiers at once, its optimizer's step too."""
    settings = PlanSettings(batch_size=size.batch[0], tier_passes="batched", device=device)
    model, watch = packed_model(size, device, layers=2), WatchedStep(device)
    with tempfile.TemporaryDirectory() as folder:
        changes = {"max_steps": 3, "gradient_accumulation_steps": 1, "logging_strategy": "no"}
        trainer = trainer_on(model, random_batch(size), settings, folder, **changes)
        trainer.add_callback(watch)
        trainer.train()
    return told("a training step", watch.found)


def told(case: str, found: Counter, most: int | None = None) -> Row:
    """A row with the places, ours first.

    Args:
        most (`int`, *optional*): waits of ours that are right.
    """
    total, ours = sum(found.values()), sum(times for place, times in found.items() if is_ours(place))
    places = [f"{place} x {times}" if times > 1 else place for place, times in sorted(found.items(), key=is_others)]
    figure = f"waits {total}, ours {ours}" + (": " if places else "") + ", ".join(places)
    result = MEASURED if most is None else verdict(ours <= most, f"{most} expected")
    return Row(case, figure, result, {"waits": total, "ours": ours})


def is_ours(place: str) -> bool:
    return place.startswith(f"{PACKAGE.name}/")


def is_others(item: tuple[str, int]) -> tuple[bool, int]:
    return not is_ours(item[0]), -item[1]


@contextmanager
def waits(device: str) -> Iterator[Counter]:
    """Counts waits within the block by file and line, in all threads: of the innermost frame that is ours, else of the
    innermost."""
    found, lock = Counter(), threading.Lock()

    def note(message: Warning | str, category: Any, filename: str, line: int, *args: Any, **kwargs: Any) -> None:
        if MESSAGE in str(message):
            with lock:
                found[place_of(traceback.extract_stack(), filename, line)] += 1

    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            stack.enter_context(WarningHostWatch())
            stack.enter_context(WarningOperators())
        yield found


def place_of(frames: traceback.StackSummary, filename: str, line: int) -> str:
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if ours:
        return f"{Path(ours[-1].filename).relative_to(PACKAGE.parent)}:{ours[-1].lineno}"
    return f"{'/'.join(Path(filename).parts[-3:])}:{line}"


class WarningHostWatch(HostWatch):
    """On a CPU, says what CUDA would of methods that read numbers."""

    def note_wait(self) -> None:
        warnings.warn(MESSAGE, stacklevel=3)

    def note_upload(self) -> None:
        """From pinned memory the host does not wait."""


class WarningOperators(TorchDispatchMode):
    """The same of operators, `item` and truth values among them."""

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.name().partition("::")[2].partition(".")[0] in WAITING_OPERATORS:
            warnings.warn(MESSAGE, stacklevel=2)
        return func(*args, **(kwargs or {}))
