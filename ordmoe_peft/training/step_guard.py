"""Steps that must not move the weights: what is not finite in them, or nothing to learn from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import reduce
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import OrdMoERuntimeError
from ._compat import mark_step_skipped
from .checkpoints import last_checkpoint
from .tier_scores import TierScores


logger = logging.get_logger(__name__)

STATE_NAME = "OrdMoEStepGuard"
LOGGED_COUNTS = ("nonfinite_steps", "overflowed_steps", "empty_batches")
# Steps that did not move the weights, by what was wrong with them.
DROPPED = {
    "nonfinite_steps": "with a loss or gradient that was not finite",
    "empty_steps": "without a response to learn from",
    "overflowed_steps": "whose gradient overflowed in fp16",
}


@dataclass
class StepSoFar:
    """The step that runs, on this process: its rows with a response, its micro-batches without one, how many values
    each metric had before it, the loss of its passes so far, and what was not finite in them.
    """

    rows: int = 0
    empty_batches: int = 0
    metrics_before: dict[str, int] = field(default_factory=dict)
    loss: torch.Tensor | float = 0.0
    found: list[str] = field(default_factory=list)


@dataclass
class MeanLoss:
    """The mean of the losses of real steps, as against those that were dropped."""

    total: torch.Tensor | float = 0.0
    steps: int = 0
    dropped: int = 0

    def add(self, loss: torch.Tensor | float, is_dropped: bool) -> None:
        self.total = self.total + (0.0 if is_dropped else loss)
        self.steps += not is_dropped
        self.dropped += is_dropped

    def over_processes(self, name: str) -> dict[str, float]:
        """The mean over all processes under `name`; nothing where there is no step."""
        return {name: reduce(self.total, reduction="mean").item() / self.steps} if self.steps else {}


class StepGuard(TrainerCallback):
    """Drops the update of a step in which a loss or gradient was not finite, or no batch had a response to learn from.

    The gradients are taken away before the optimizer's step, so weights and optimizer state stay as they are; learning
    rate schedule and step count go on. All processes decide alike. Overflow under a gradient scaler (fp16) is left to
    the scaler, which keeps the optimizer from stepping and lowers its scale; the learning rate's schedule waits.
    DeepSpeed takes its step within the last backward: it drops one with a gradient that is not finite itself, and the
    schedule waits; where it did not drop a step that had to be, training ends.

    Losses and metrics that are logged are means over the other steps, and left out where there are none. No checkpoint
    is saved before a step has moved the weights.

    Logged, once they are not 0: `nonfinite_steps`, steps whose update was dropped since training began,
    `overflowed_steps`, those that a scaler kept from moving the weights, and `empty_batches`, micro-batches without a
    response token of all processes, which add nothing to their step. All, and how many steps in a row were dropped, are
    part of the trainer's state, so that a resumed run counts on.

    Args:
        max_nonfinite_steps (`int`): number of such steps in a row that ends training.
        metrics (`dict`): where the trainer keeps lists of what it logs next.

    Raises:
        [`OrdMoERuntimeError`]: so many steps in a row were not finite; names the last good step and checkpoint. Or none
            of so many first steps had a response, or most steps of the run were dropped. Or a gradient overflows fp16
            without being scaled up, or DeepSpeed has updated the weights in a step that had to be dropped.
    """

    def __init__(self, max_nonfinite_steps: int, metrics: dict[str, list[float]]):
        self.max_nonfinite_steps, self.metrics = max_nonfinite_steps, metrics
        self.step = self.ended_step = StepSoFar()
        self.scale = 0.0  # of the gradient scaler in the step that has just ended; 0 without one
        self.counts: dict[str, int] = {}
        self.is_dropped, self.last_found = False, ""
        self.since_log, self.since_begin = MeanLoss(), MeanLoss()

    def on_train_begin(self, args, state, control, **kwargs):
        self.step, self.since_log, self.since_begin = StepSoFar(), MeanLoss(), MeanLoss()
        self.counts = state.stateful_callbacks.setdefault(STATE_NAME, {})
        for name in (*LOGGED_COUNTS, *DROPPED, "in_a_row"):
            self.counts.setdefault(name, 0)

    def begin_step(self, rows_of_batches: list[int]) -> None:
        """Begin a step, given the rows with a response in each of its micro-batches, on this process."""
        metrics_before = {name: len(values) for name, values in self.metrics.items()}
        self.step = StepSoFar(sum(rows_of_batches), rows_of_batches.count(0), metrics_before)

    @torch.no_grad()
    def check_pass(
        self, tiers: list[int], scores: TierScores | None, loss: torch.Tensor, gradients: Iterable[torch.Tensor]
    ) -> None:
        """Add a pass over `tiers` to its step, after its backward, and note what is not finite.

        `scores` are what is known of the batch by now. No `gradients` are given where a scaler looks after them.
        """
        step = self.step
        step.loss = step.loss + loss
        by_tier = {} if scores is None else _values_by_name(scores)
        names = " and ".join(map(str, tiers))
        overall = {
            f"loss in the pass of tier {names}": loss,
            f"gradient of the pass of tier {names}": _largest(gradients),
        }
        values = by_tier | overall
        finite = torch.stack([value.isfinite().all().to(loss.device) for value in values.values()]).tolist()
        bad = [name for name, is_finite in zip(values, finite, strict=True) if not is_finite]
        named = [name for name in bad if name in by_tier and name not in step.found]
        # Report loss or gradient only if no likelihood is already named as the cause.
        step.found += named or ([] if step.found else bad[:1])

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        step, self.step = self.step, StepSoFar()
        self.ended_step, self.scale = step, _scale_of(optimizer)
        has_stepped = args.deepspeed_plugin is not None
        is_skipped = has_stepped and optimizer.step_was_skipped
        if is_skipped and not step.found and not args.fp16:
            step.found.append("gradient")
        counts = torch.tensor([bool(step.found), step.rows, step.empty_batches], device=args.device)
        is_bad, rows, empty_batches = reduce(counts, reduction="sum").tolist()
        self.counts["empty_batches"] += empty_batches
        self.counts["in_a_row"] = self.counts["in_a_row"] + 1 if is_bad else 0
        self.counts["nonfinite_steps"] += bool(is_bad)
        self.counts["empty_steps"] += not (is_bad or rows)
        self.is_dropped = bool(is_bad or not rows)
        if self.is_dropped and has_stepped and not is_skipped:
            raise _moved_all_the_same(state.global_step + 1, ", ".join(step.found), args.output_dir)
        if self.is_dropped:
            optimizer.zero_grad()
        if self.num_dropped == state.global_step + 1 >= self.max_nonfinite_steps and not is_bad:
            raise self._nothing_learnt(state.global_step + 1)
        if is_bad:
            self.last_found = ", ".join(step.found)
            self._report(state.global_step + 1, self.last_found or "something on another process", args.output_dir)

    def _forget_metrics(self, before: dict[str, int]) -> None:
        for name, values in list(self.metrics.items()):
            del values[before.get(name, 0) :]
            if not values:
                del self.metrics[name]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if _scale_of(optimizer) < self.scale:
            mark_step_skipped(optimizer)
        is_overflow = not self.is_dropped and getattr(optimizer, "step_was_skipped", False)
        self.counts["overflowed_steps"] += is_overflow
        is_still = self.is_dropped or is_overflow
        for mean in (self.since_log, self.since_begin):
            mean.add(self.ended_step.loss, is_still)
        if is_still:
            self._forget_metrics(self.ended_step.metrics_before)
        self.metrics |= {name: [self.counts[name]] for name in LOGGED_COUNTS if self.counts[name]}
        if is_overflow and 0 < self.scale < 1:
            raise self._overflows(state.global_step + 1, args.output_dir)

    def on_step_end(self, args, state, control, **kwargs):
        if self.num_dropped == state.global_step:
            control.should_save = False

    @property
    def num_dropped(self) -> int:
        """Steps that did not move the weights since the run began, resumed or not."""
        return sum(self.counts[name] for name in DROPPED)

    def correct_means(self, logs: dict[str, float]) -> None:
        """Make the losses in the trainer's `logs` means over the steps that moved the weights, where not all did."""
        is_of_steps = "loss" in logs
        for name, mean in (("loss", self.since_log), ("train_loss", self.since_begin)):
            if name in logs and (mean.dropped or not mean.steps):
                del logs[name]
                logs |= mean.over_processes(name)
        if is_of_steps:
            self.since_log = MeanLoss()

    def check_run(self, num_steps: int, trained: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See that a run of so many steps has left an adapter to keep, with the weights that it `trained`.

        Raises:
            [`OrdMoERuntimeError`]: it took no step, most did not move the weights, or these are not finite.
        """
        if not num_steps:
            raise OrdMoERuntimeError("The run took no step: set max_steps or num_train_epochs higher.")
        if 2 * self.num_dropped > num_steps:
            raise self._nothing_learnt(num_steps)
        broken = [name for name, weight in trained if not bool(_local(weight).isfinite().all())]
        if broken:
            raise OrdMoERuntimeError(
                f"{len(broken)} trained weights are not finite after the last step, such as {broken[0]}. The adapter "
                "is not saved. Lower learning_rate or weight_decay."
            )

    def _nothing_learnt(self, num_steps: int) -> OrdMoERuntimeError:
        reasons = ", ".join(f"{self.counts[name]} {reason}" for name, reason in DROPPED.items() if self.counts[name])
        return OrdMoERuntimeError(
            f"{self.num_dropped} of {num_steps} steps did not move the weights: {reasons}"
            f"{f' (the last: {self.last_found})' if self.last_found else ''}. The adapter is not what the run should "
            "have made, and is not saved. Lower learning_rate, look for values that are not finite in the base's "
            "weights, and see that max_length leaves room for responses."
        )

    def _overflows(self, step: int, output_dir: str) -> OrdMoERuntimeError:
        return OrdMoERuntimeError(
            f"Training ends at step {step}: the gradient is not finite in fp16 even at a scale of {self.scale}, after "
            f"{self.counts['overflowed_steps']} steps that the gradient scaler kept from moving the weights. "
            f"{_last_saved(output_dir)} Use bf16=True or fp16=False, or lower learning_rate or erl_coef."
        )

    def _report(self, step: int, found: str, output_dir: str) -> None:
        in_a_row = self.counts["in_a_row"]
        if in_a_row < self.max_nonfinite_steps:
            logger.warning(
                f"Step {step}: not finite: {found}. The update is dropped; {self.max_nonfinite_steps} such steps in a "
                f"row end training (max_nonfinite_steps), and this is number {in_a_row}."
            )
            return
        raise OrdMoERuntimeError(
            f"Training ends at step {step}: not finite: {found}. That is {in_a_row} steps in a row whose update "
            f"was dropped (max_nonfinite_steps), so the weights are those after step {step - in_a_row}. "
            f"{_last_saved(output_dir)} Lower learning_rate or erl_coef, set lower_tier_floor='uniform', or look at "
            "the data of these steps."
        )


def _moved_all_the_same(step: int, found: str, output_dir: str) -> OrdMoERuntimeError:
    reason = f"not finite: {found}" if found else "no process had a response to learn from"
    return OrdMoERuntimeError(
        f"Training ends at step {step}: {reason}, and DeepSpeed has updated the weights all the same. "
        f"{_last_saved(output_dir)} Look at the data of this step, or use DDP or FSDP2, with which such a step does "
        "not move the weights."
    )


def _last_saved(output_dir: str) -> str:
    checkpoint = last_checkpoint(output_dir)
    return f"The last checkpoint is {f'`{checkpoint}`' if checkpoint else 'none: none was saved yet'}."


def _scale_of(optimizer: Any) -> float:
    """What the gradient scaler of `optimizer` multiplies gradients by; 0 without one."""
    scaler = getattr(optimizer, "scaler", None)
    return 0.0 if scaler is None else scaler.get_scale()


def _values_by_name(scores: TierScores) -> dict[str, torch.Tensor]:
    values = {f"log-likelihood under tier {tier}": scores.by_tier[tier][0] for tier in scores.tiers}
    for tier in scores.tiers if scores.reference else ():
        values[f"log-likelihood under tier {tier} of the frozen base"] = scores.reference[tier][0]
    return values | {"supervised loss": scores.ntp_loss}


def _largest(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([_local(gradient) for gradient in gradients], norm_type=torch.inf)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of what FSDP2 or ZeRO-3 shares out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
