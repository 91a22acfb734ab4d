"""Which batches run under all tiers at once, and which tier by tier: `tier_passes`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..errors import OrdMoEConfigError
from .optimizer_states import missing_bytes, trained
from .pass_memory import SHARE_OF_ROOM, Meter, PassMemory, measured_passes, meter_of


logger = logging.get_logger(__name__)

STATE_NAME = "OrdMoEPassSchedule"


class PassSchedule(TrainerCallback):
    """Answers, for each batch, whether its tier passes run one after another.

    At once is faster, on GPUs above all: tier by tier pays for unpacking experts again in each pass. `"auto"` runs the
    first micro-batch of training tier by tier and measures it, and from then on at once whatever is expected to fit: a
    batch whose tokens, under all tiers, take at most [`SHARE_OF_ROOM`] of what was free before the first micro-batch,
    less the gradients and optimizer states that did not exist yet. What does not grow with tokens counts as if it did,
    so a batch that would run tier by tier and has more than twice the tokens of the last that was measured is measured
    in its turn. The number of tokens up to which batches run at once is part of the trainer's state, so that a resumed
    run does as the first one did.

    Args:
        mode (`str`): `"batched"`, `"sequential"` or `"auto"`.
        num_passes (`int`): forwards with a gradient that a batch takes tier by tier.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        saves_memory (`bool`, defaults to `False`): whether activations are offloaded, where `"auto"` has nothing to
            measure: tiers then run one after another.

    Raises:
        [`OrdMoEConfigError`]: tier by tier with DeepSpeed, which updates the weights within each backward.
    """

    def __init__(self, mode: str, num_passes: int, accelerator: Accelerator, saves_memory: bool = False):
        if accelerator.distributed_type == DistributedType.DEEPSPEED and num_passes > 1:
            if mode == "sequential":
                raise OrdMoEConfigError(
                    "tier_passes='sequential' takes a backward for each tier, and DeepSpeed updates the weights within "
                    "backward. Set tier_passes='batched', or use DDP or FSDP."
                )
            mode = "batched"
        self.mode, self.num_passes, self.accelerator = mode, num_passes, accelerator
        self.saves_memory = saves_memory
        self.state: Any = None
        self.optimizer: Any = None
        self.optimizer_name = ""
        self.meter: Meter | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.state, self.optimizer, self.optimizer_name = state, optimizer, OptimizerNames(args.optim).value
        if self.max_tokens in (0, float("inf")):
            return
        self.meter = meter_of(self.accelerator.device)
        if self.max_tokens is not None:
            return
        devices = {parameter.device for parameter in trained(optimizer)}
        if self.saves_memory:
            self._settle(0, "activations are offloaded to save memory")
        elif self.meter is None:
            self._settle(0, f"the peak memory of a pass cannot be measured on {self.accelerator.device.type}")
        elif len(devices) > 1:
            self._settle(0, f"the model is split over {len(devices)} devices, of which one alone can be measured")

    @property
    def max_tokens(self) -> float | None:
        """Most tokens of a batch that runs under all tiers at once; `None` where `"auto"` has not measured yet."""
        if self.num_passes == 1 or self.mode == "batched":
            return float("inf")
        if self.mode == "sequential":
            return 0
        return self.state.stateful_callbacks.get(STATE_NAME, {}).get("max_tokens") if self.state else None

    def is_tier_by_tier(self, inputs: dict[str, Any]) -> bool:
        """Whether this batch runs tier by tier; all processes give the same answer."""
        limit = self.max_tokens
        if limit is None or limit in (0, float("inf")):
            return limit != float("inf")
        return self._over_processes(inputs["input_ids"].numel()).max().item() > limit

    @contextmanager
    def of_training(self, inputs: dict[str, Any]) -> Iterator[bool]:
        """The same for a batch that is trained on in the block, where `"auto"` measures some."""
        is_tier_by_tier = self.is_tier_by_tier(inputs)
        if self.meter is None or not is_tier_by_tier or not self._is_to_measure(inputs):
            yield is_tier_by_tier
            return
        missing_states = missing_bytes(self.optimizer_name, self.optimizer)
        with measured_passes(self.meter, trained(self.optimizer), missing_states) as memory:
            yield True
        self._choose(memory, inputs["input_ids"].numel())

    def _is_to_measure(self, inputs: dict[str, Any]) -> bool:
        if not self.max_tokens:
            return self.max_tokens is None  # 0 is for good: a larger batch does not fit either
        measured = self.state.stateful_callbacks[STATE_NAME].get("measured_tokens", float("inf"))
        return self._over_processes(inputs["input_ids"].numel()).max().item() > 2 * measured

    def _choose(self, memory: PassMemory, tokens: int) -> None:
        limit = int(self._over_processes(memory.max_tokens(tokens, self.num_passes)).min())
        peak, free, to_come = (f"{size / 2**30:.2f} GiB" for size in (memory.peak, memory.free, memory.to_come))
        self._settle(
            limit,
            f"a pass over {tokens} tokens took {peak}; {free} were free, of which {to_come} are for gradients and "
            f"optimizer states that did not exist yet, and {SHARE_OF_ROOM:.0%} of the rest may be used",
            measured_tokens=int(self._over_processes(tokens).max()),
        )

    def _settle(self, max_tokens: int, reason: str, **measured: int) -> None:
        self.state.stateful_callbacks[STATE_NAME] = {"max_tokens": max_tokens, **measured}
        if self.accelerator.is_main_process:
            choice = "all batches run their tier passes one after another"
            if max_tokens:
                choice = (
                    f"batches of up to {max_tokens} tokens run their {self.num_passes} tier passes at once, others one "
                    "after another"
                )
            logger.warning(f"tier_passes='auto': {reason}, so {choice}.")

    def _over_processes(self, number: int) -> torch.Tensor:
        return self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
