"""What a run was, for the record and the card that are saved with the adapter: settings, data, figures and curves."""

import math
import platform
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerState

from .arguments import ACT_BETWEEN_TIERS, ACT_ON_ERL, ACT_ONLY_WITH, OrdMoETrainingArguments


OBJECTIVE = ("objective", "ntp_coef", "erl_coef", "balance_coef", "objective_beta", "lower_tier_floor")
RESPONSES = ("responses", "scored_by")
SETTINGS = (
    *("learning_rate", "router_learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay"),
    *("max_grad_norm", "max_length", "bf16", "fp16", "seed"),
)
CURVES = re.compile(r"loss|ntp_loss|erl_loss|balance_loss|tier_\d+/log_likelihood")
MOST_POINTS = 11


def run_summary(
    state: TrainerState,
    args: OrdMoETrainingArguments,
    data: Mapping[str, Any],
    num_tiers: int,
    is_resumed: bool = False,
) -> dict[str, Any]:
    """What a run was up to now, as JSON has it.

    Args:
        state ([`~transformers.TrainerState`]): the trainer's.
        args ([`OrdMoETrainingArguments`]): what it was given.
        data (`dict`): what [`data_source`] returned.
        num_tiers (`int`): C; with 1, what acts between tiers alone is left out.
        is_resumed (`bool`): whether part of it ran in another process, so that nothing here knows how long it took.

    Returns:
        `dict`: `objective` and `settings`, by the names of the arguments; `data`; `figures`, of steps, tokens, time
        in seconds and memory in bytes; `curves`, up to 11 entries of the log, from the first to the last, with losses
        and mean log-likelihoods per response token in nats; `evaluations`, those before the first step and the last.
        `None` stands for numbers that are not finite.
    """
    given, history = args.to_dict(), state.log_history
    names = [*OBJECTIVE, *RESPONSES]
    if args.responses == "generated":
        names += ACT_ONLY_WITH["responses", "generated"]
    if num_tiers == 1:
        names = [name for name in names if name not in (*ACT_BETWEEN_TIERS, *ACT_ON_ERL)]
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    curves = [_logged(entry) for entry in history if "loss" in entry]
    return {
        "objective": {name: given[name] for name in names if given[name] is not None},
        "settings": {"batch_size": rows} | {name: given[name] for name in SETTINGS if given[name] is not None},
        "data": dict(data),
        "figures": _figures(state, args, is_resumed),
        "curves": thinned(curves),
        "evaluations": _evaluations(history),
    }


def data_source(dataset: Any) -> dict[str, Any]:
    """What a data set says of itself: `name`, of its folder or of its repository without the owner, `config`, `split`,
    `rows`, `columns`. What it does not know is left out."""
    info, split = getattr(dataset, "info", None), getattr(dataset, "split", None)
    config = getattr(info, "config_name", None)
    known = {
        "name": getattr(info, "dataset_name", None),
        "config": None if config == "default" else config,
        "split": None if split is None else str(split),
        "rows": len(dataset) if isinstance(dataset, Dataset) else None,
        "columns": list(getattr(dataset, "column_names", None) or []),
    }
    return {name: value for name, value in known.items() if value}


def thinned(points: Sequence[Any], most: int = MOST_POINTS) -> list[Any]:
    """At most `most` of the points, evenly spaced, the first and the last among them."""
    last = len(points) - 1
    if last < most:
        return list(points)
    return [points[round(index * last / (most - 1))] for index in range(most)]


def peak_memory() -> int:
    """The most memory that this process has held, in bytes: on the CUDA device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _figures(state: TrainerState, args: OrdMoETrainingArguments, is_resumed: bool) -> dict[str, Any]:
    last = {name: value for entry in state.log_history for name, value in entry.items()}
    tokens = last.get("num_tokens")
    seconds = None if is_resumed else last.get("train_runtime")
    is_cuda = args.device.type == "cuda"
    known = {
        "steps": state.global_step,
        "epochs": state.epoch,
        "tokens": None if tokens is None else int(tokens),
        "mean_loss": last.get("train_loss"),
        "seconds": seconds,
        "seconds_per_step": seconds / state.global_step if seconds and state.global_step else None,
        "peak_memory_bytes": peak_memory(),
        "processes": args.world_size,
        "device": torch.cuda.get_device_name(args.device) if is_cuda else f"{args.device.type} ({platform.machine()})",
    }
    return {name: _rounded(value) for name, value in known.items() if value is not None}


def _evaluations(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [entry for entry in history if "eval_loss" in entry]
    chosen = [entry for entry in found[:1] if entry["step"] == 0] + [entry for entry in found[-1:] if entry["step"] > 0]
    return [
        {
            "of": "adapter" if entry["step"] else "base",  # LoRA adds nothing before the first step
            "step": entry["step"],
            "metrics": _metrics({name.removeprefix("eval_"): value for name, value in entry.items()}),
        }
        for entry in chosen
    ]


def _logged(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": entry["step"], **_metrics(entry)}


def _metrics(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in entry.items() if CURVES.fullmatch(name)}


def _rounded(value: Any) -> Any:
    """A number to six digits."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
