"""Records what a run was begun with in a file beside its results.

So a run is resumed with its own data and settings alone, and does not overwrite the results of another. The record
holds the base, the adapter's configuration, the data and the settings that decide what is learnt. Settings that only
decide how long, how fast or how watched a run is may change when it is resumed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging
from trl import SFTConfig

from ..adapter.config import OrdMoEConfig
from ..data.shards import flattened
from ..errors import OrdMoEConfigError
from ..files import write_whole
from .arguments import OrdMoETrainingArguments
from .checkpoints import checkpoint_to_resume, discard, is_complete


logger = logging.get_logger(__name__)

RECORD_NAME = "ordmoe_run.json"
RESULT_NAMES = (
    *("adapter_model.safetensors", "adapter_config.json", "train_results.json", "all_results.json"),
    "trainer_state.json",
)
# The settings of transformers and TRL that decide what is learnt from each sample, and in which order they come.
DECISIVE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    *("average_tokens_across_devices", "max_length", "truncation_mode", "packing", "packing_strategy", "padding_free"),
    *("completion_only_loss", "assistant_only_loss", "loss_type", "dataset_text_field", "shuffle_dataset"),
    *("chat_template_path", "eos_token", "pad_token"),
)
# Of our own settings, those that decide nothing of it.
INDECISIVE = (
    *("share_prompt", "tier_passes", "max_nonfinite_steps", "log_tiers_every", "log_router_health"),
    "overwrite_output_dir",
)
NOT_OF_THE_ADAPTER = ("peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping")
NOT_OF_THE_BASE = ("transformers_version", "use_cache", "architectures")
SAMPLED_ROWS, SAMPLED_VALUES = 1000, 64
MOST_NAMED = 8


# ------------------------------------------------------------------------------------------------------------ a record
@dataclass(frozen=True)
class RunDescription:
    """What decides what a run learns, as JSON has it, and how long it is to be, in steps or in epochs."""

    parts: dict[str, Any]
    goal: tuple[str, float]


def describe_run(
    model: nn.Module, config: OrdMoEConfig, args: OrdMoETrainingArguments, data: dict[str, Any]
) -> RunDescription:
    """The description of a run with these; `data` is what [`describe_data`] says of its data."""
    own = {field.name for field in fields(args)} - {field.name for field in fields(SFTConfig)} - {*INDECISIVE}
    settings = {name: value for name, value in args.to_dict().items() if name in own or name in DECISIVE}
    # Of a step, however it is shared out over processes and micro-batches.
    settings["batch_size"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    adapter = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_THE_ADAPTER}
    record = {"base": _describe_base(model), "adapter": adapter, "data": data, "settings": settings}
    text = json.dumps(record, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return RunDescription(json.loads(text), goal_of(args))


def goal_of(args: OrdMoETrainingArguments) -> tuple[str, float]:
    """How long a run is to be."""
    return ("steps", args.max_steps) if args.max_steps > 0 else ("epochs", args.num_train_epochs)


def _describe_base(model: nn.Module) -> dict[str, Any]:
    """The base's configuration, and a digest of its weights: some values of each frozen tensor, but for those that are
    sharded, offloaded, or in 4 bits, which each device packs in its own way."""
    config = model.config.to_dict()
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        is_whole = type(weight) is nn.Parameter and weight.device.type != "meta" and weight.is_floating_point()
        if is_whole and not weight.requires_grad and "lora_" not in name:
            values = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLED_VALUES)]
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        **{name: value for name, value in flattened(config).items() if _is_of_the_base(name.rpartition(".")[2])},
        "is_quantized": config.get("quantization_config") is not None,
        "weights": digest.hexdigest(),
    }


def _is_of_the_base(name: str) -> bool:
    # Token ids are set from the tokenizer, and implementations of attention and experts round otherwise at most.
    return name not in NOT_OF_THE_BASE and not name.startswith("_") and not name.endswith(("_id", "implementation"))


def describe_data(dataset: Any) -> dict[str, Any]:
    """What tells data sets apart: columns, how many rows, and a digest of up to 1,000; of a stream, its first row."""
    digest = hashlib.sha256()
    for row in _sampled_rows(dataset):
        digest.update(json.dumps(row, sort_keys=True, default=_fingerprint).encode())
    rows = {"rows": len(dataset)} if isinstance(dataset, Dataset) else {}
    return {"columns": sorted(dataset.column_names or []), **rows, "digest": digest.hexdigest()}


def _sampled_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(dataset, Dataset):
        yield next(iter(dataset))
        return
    every = math.ceil(len(dataset) / SAMPLED_ROWS)
    for table in dataset.select(range(0, len(dataset), every)).with_format("arrow").iter(batch_size=50):
        yield from table.to_pylist()


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__


# -------------------------------------------------------------------------------------------------------- its folder
class RunFolder:
    """The folder of a run's results, its `output_dir`.

    In its methods `wish` is `resume_from_checkpoint`, and `overwrite` is `overwrite_output_dir`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @property
    def record(self) -> dict[str, Any] | None:
        """What the run was begun with, if that is recorded."""
        path = self.folder / RECORD_NAME
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise OrdMoEConfigError(
                f"{path} is no JSON ({error}), so it does not say which run the results beside it are of. Delete it "
                "with them, or give another output_dir."
            ) from error

    @property
    def results(self) -> list[Path]:
        """What a run has left that another would overwrite."""
        checkpoints = map(Path, filter(is_complete, sort_checkpoints(str(self.folder))))
        return [*checkpoints, *(path for name in RESULT_NAMES if (path := self.folder / name).is_file())]

    def check_free(self, wish: str | bool | None, overwrite: bool) -> None:
        """See that a run that starts from the beginning overwrites no results, unless it is told to.

        Raises:
            [`OrdMoEConfigError`]: it would, or is told to go on and to overwrite.
        """
        if overwrite and not _starts_anew(wish):
            raise OrdMoEConfigError(
                f"overwrite_output_dir=True deletes the checkpoints that resume_from_checkpoint={wish} goes on from. "
                "Set one of them."
            )
        if _starts_anew(wish) and not overwrite and self.results:
            raise OrdMoEConfigError(
                f"{self.folder} has results of an earlier run, such as {self.results[0].name}. Give another "
                "output_dir, resume_from_checkpoint='auto' to go on with that run, or overwrite_output_dir=True to "
                "delete its checkpoints and adapter."
            )

    def check(self, run: RunDescription, wish: str | bool | None, overwrite: bool) -> str | None:
        """The checkpoint that `run` starts from, None for the beginning, if no other run's results are in the way.

        Raises:
            [`OrdMoEConfigError`]: names what the results in the folder, or the checkpoint, were made with instead.
        """
        self.check_free(wish, overwrite)
        checkpoint = checkpoint_to_resume(wish, self.folder)
        origin = self.folder.resolve() if checkpoint is None else Path(checkpoint).resolve().parent
        is_own = origin == self.folder.resolve()
        if not is_own:
            RunFolder(origin)._check_same({part: run.parts[part] for part in ("base", "adapter")})
        if not _starts_anew(wish) and self.results:
            if self.record is None and (checkpoint is None or not is_own):
                raise OrdMoEConfigError(
                    f"{self.folder} has results, such as {self.results[0].name}, but no {RECORD_NAME}, so they may be "
                    "of another run. Give another output_dir."
                )
            self._check_same(run.parts)
        return checkpoint

    def begin(self, run: RunDescription, wish: str | bool | None, overwrite: bool) -> str | None:
        """[`check`], and record the run unless it is finished; an earlier one is deleted where that was asked for."""
        checkpoint = self.check(run, wish, overwrite)
        if overwrite:
            for earlier in sort_checkpoints(str(self.folder)):
                discard(earlier)
            for path in self.results:
                path.unlink()
        if not self.is_finished(run.goal):
            self._write(run.parts)
        if checkpoint is not None:
            logger.warning(f"Resuming from {Path(checkpoint).name} in {Path(checkpoint).parent}.")
        elif not _starts_anew(wish) and self.folder.is_dir():
            logger.warning(f"No checkpoint in {self.folder}: training starts from the beginning.")
        return checkpoint

    def holds(self, run: RunDescription, wish: str | bool | None, overwrite: bool) -> bool:
        """[`check`], and whether all results of the run, or of a longer one, are there to stay."""
        self.check(run, wish, overwrite)
        return not overwrite and self.is_finished(run.goal)

    def finish(self, goal: tuple[str, float]) -> None:
        """Record that a run of this length has left all its results."""
        self._write({**(self.record or {}), "finished": goal})

    def is_finished(self, goal: tuple[str, float]) -> bool:
        """Whether a run of this length, or a longer one, has left all its results."""
        unit, amount = (self.record or {}).get("finished", (None, 0))
        return bool(self.results) and unit == goal[0] and amount >= goal[1]

    def _write(self, record: dict[str, Any]) -> None:
        write_whole(self.folder / RECORD_NAME, json.dumps(record, indent=2, sort_keys=True) + "\n")

    def _check_same(self, now: dict[str, Any]) -> None:
        if self.record is None:
            logger.warning(f"{self.folder} has no {RECORD_NAME}, so its run cannot be compared with this one.")
            return
        there, now = flattened(self.record), flattened(now)
        # What only one of them names comes of another version.
        names = [name for name in sorted(there.keys() & now.keys()) if there[name] != now[name]]
        if names:
            listed = ", ".join(f"{name} ({there[name]!r} there, {now[name]!r} now)" for name in names[:MOST_NAMED])
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            raise OrdMoEConfigError(
                f"{self.folder} is of a run that was begun otherwise: {listed}{more}. To go on with it, give what "
                "it was begun with; else another output_dir."
            )


def _starts_anew(wish: str | bool | None) -> bool:
    return wish is None or str(wish).lower() == "false"


def on_first_process(act: Callable[[], Any]) -> Any:
    """What `act` returns, or raises for the user, on the first process: it decides for all.

    One on a machine that sees no checkpoint must fail, not start anew.
    """
    value = error = None
    if PartialState().is_main_process:
        try:
            value = act()
        except OrdMoEConfigError as refusal:
            error = refusal
    [(value, error)] = broadcast_object_list([(value, error)])
    if error is not None:
        raise error
    return value
