"""Uses of names of the trainer upstream that are not public. See `ordmoe_peft/_compat.py`."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub.constants import REPOCARD_NAME
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig, SFTTrainer

from ..adapter.record import RECORD_NAME
from ..files import whole_file
from .checkpoints import discard, discard_oldest, is_same


# Names of arguments that may be given as JSON in a string. transformers looks for them in this attribute, which each
# of TRL's configurations extends.
JSON_ARGUMENTS = tuple(SFTConfig._VALID_DICT_FIELDS)


class WholeCheckpoints(Trainer):
    """What [`~transformers.Trainer`] lacks for a run that is killed at any moment to go on as if it had not been.

    transformers writes `trainer_state.json` last, which `checkpoints.py` relies on. It does not wait for the other
    processes' random states, writes over an earlier checkpoint of the same step, deletes checkpoints in any order,
    trains on where a run is resumed at its end, and uploads a checkpoint's adapter without its record and card. It
    loads an adapter by PEFT's `load_adapter`, which casts one in 16 bits to float32. Remove when it does otherwise
    (transformers 5.24, `trainer.py`; peft 0.21, `BaseTuner`).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with trained_dtypes_kept(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with trained_dtypes_kept(self.model):
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, limit = self._get_output_dir(trial), self.args.save_total_limit
        checkpoint = Path(folder, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            discard(checkpoint)
        self.accelerator.wait_for_everyone()
        with ExitStack() as on_failure:
            on_failure.callback(discard, checkpoint)  # a disk that is full gets its room back
            self.args.save_total_limit = None  # upstream would delete the oldest in its way
            self.model.makes_probes = False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
                self.model.makes_probes = True
            on_failure.pop_all()
        if self.args.should_save:
            with whole_file(checkpoint / TRAINING_ARGS_NAME) as file:
                torch.save(self.args, file)  # upstream's has no limit
            discard_oldest(folder, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Upstream copies the adapter's weights and configuration to the folder that it uploads, and those alone.
        if self.is_world_process_zero():
            for name in (RECORD_NAME, REPOCARD_NAME):
                if (path := Path(checkpoint_folder, name)).is_file():
                    shutil.copyfile(path, Path(self.args.output_dir, name))
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process writes its own; the first then writes the last file

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed within an epoch at its last step, upstream trains one step more before it looks.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        # Upstream deletes all but the best here, so that nothing of it is left to do.
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for checkpoint in sort_checkpoints(self._get_output_dir(trial)):
                if not is_same(checkpoint, best):
                    discard(checkpoint)
        return super()._finalize_training(trial, *args)


@contextmanager
def trained_dtypes_kept(model: nn.Module) -> Iterator[None]:
    """After the block, the parameters of `model` that are trained have the dtypes that they had before."""
    dtypes = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, dtype in dtypes.items():
        weight = model.get_parameter(name)
        weight.data = weight.data.to(dtype)


def mark_step_skipped(optimizer: AcceleratedOptimizer) -> None:
    """Have `optimizer` say that its gradient scaler kept it from stepping.

    accelerate takes a step that was called for one that was taken, and fused optimizers are called and skip by
    themselves, so the learning rate's schedule would go on (1.15, `optimizer.py`; accelerate #4242). Remove when it
    asks the scaler.
    """
    optimizer._is_overflow = True


def logged_metrics(trainer: SFTTrainer, mode: str) -> dict[str, list[float]]:
    """What the trainer logs next of a mode, `"train"` or `"eval"`: lists that it averages and empties."""
    return trainer._metrics[mode]
