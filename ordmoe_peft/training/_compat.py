"""Uses of names of the trainer upstream that are not public. See `ordmoe_peft/_compat.py`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import sort_checkpoints
from trl import SFTTrainer

from .checkpoints import (
    STATE_NAME,
    clear_unfinished,
    discard,
    discard_oldest,
    is_same,
    move_to_place,
    unfinished_folder,
)


class WholeCheckpoints:
    """Mixin of a [`~transformers.Trainer`]: its checkpoints are there whole or not at all, as `checkpoints.py` says,
    and a run resumed from its last one is at its end.

    The trainer has no seam for where a checkpoint is written: `_save_checkpoint` makes its path from `_get_output_dir`
    and fills it file by file, and `on_save` comes after. Remove when the trainer does this itself (transformers 5.23,
    `trainer.py`).
    """

    _is_saving = False
    _wants_push = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(unfinished_folder(folder)) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        if self.is_local_process_zero():
            discard(Path(folder, name))
        self.accelerator.wait_for_everyone()
        with ExitStack() as on_failure:
            on_failure.callback(clear_unfinished, folder)
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_saving = False
            self._name_best_checkpoint(folder, name)
            on_failure.pop_all()
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero():
            move_to_place(folder, name)
            clear_unfinished(folder)
        if self._wants_push:
            self._wants_push = False
            self._push_from_checkpoint(str(Path(folder, name)))
        if self.args.should_save:
            discard_oldest(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _name_best_checkpoint(self, folder: str, name: str) -> None:
        # Upstream looks for it where the checkpoint is written; its place is, or is going to be, in the run's folder.
        best = f"checkpoint-{self.state.best_global_step}"
        if best != name and not Path(folder, best).is_dir():
            return
        self.state.best_model_checkpoint = str(Path(folder, best))
        if self.args.should_save:
            self.state.save_to_json(str(unfinished_folder(folder) / name / STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run on while training does, so they begin when the checkpoint is in its place.
        if self._is_saving:
            self._wants_push = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed within an epoch at its last step, upstream trains one step more before it looks.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        # Upstream deletes all but the best here, in place, so that nothing of it is left to do.
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for checkpoint in sort_checkpoints(self._get_output_dir(trial)):
                if not is_same(checkpoint, best):
                    discard(checkpoint)
        return super()._finalize_training(trial, *args)


def logged_metrics(trainer: SFTTrainer, mode: str) -> dict[str, list[float]]:
    """What the trainer logs next of a mode, `"train"` or `"eval"`: lists that it averages and empties."""
    return trainer._metrics[mode]
