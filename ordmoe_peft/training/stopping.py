"""A run that is told to end by SIGTERM, as schedulers tell it, saves a checkpoint first.

transformers has `enable_jit_checkpoint` for that. It is not used here, because it may save between the backward and the
optimizer's step, when the random state is already that of the next step; each process decides by its own clock; and
`train()` then returns as if the run had come to its end (transformers 5.24, `trainer_jit_checkpoint.py`).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import OrdMoEInterrupted


logger = logging.get_logger(__name__)


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which one of the processes received SIGTERM, with a checkpoint of that step.

    That step is not evaluated: an evaluation may take longer than is left, and with `save_strategy="best"` it would
    decide that there is nothing to save. The signal is caught while training runs, in the main thread alone; before
    and after it acts as it did. Further ones change nothing.

    Raises:
        [`OrdMoEInterrupted`]: after the checkpoint was saved.
    """

    def __init__(self) -> None:
        self.is_asked = self.is_agreed = False
        self._earlier: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_asked = self.is_agreed = False
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.is_asked = True

    def on_step_end(self, args, state, control, **kwargs):
        self.is_agreed = self._any_process_is_asked(args)
        if self.is_agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def _any_process_is_asked(self, args: Any) -> bool:
        if args.world_size == 1:
            return self.is_asked
        return bool(reduce(torch.tensor(int(self.is_asked), device=args.device), reduction="sum"))

    def on_save(self, args, state, control, **kwargs):
        self.check(state.global_step, f"checkpoint-{state.global_step} in {args.output_dir} is complete.")

    def check(self, step: int, saved: str) -> None:
        """Raise [`OrdMoEInterrupted`] if training ended, or is to end, because it was told to."""
        if self.is_agreed:
            raise OrdMoEInterrupted(f"SIGTERM: ended after step {step}; {saved}", 128 + signal.SIGTERM)

    def restore(self) -> None:
        """Let SIGTERM do what it did before training."""
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
            self._earlier = None


@contextmanager
def sigterm_waits() -> Iterator[None]:
    """Within the block, in the main thread, SIGTERM waits for its end, and then does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)
