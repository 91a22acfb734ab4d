"""Which of a run's checkpoints can be resumed from.

The trainer writes `trainer_state.json` last, so a checkpoint is complete if that file can be read; deleting starts with
it. A process that is killed on the way then leaves a folder that is passed over.
"""

import json
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from ..errors import OrdMoEConfigError


logger = logging.get_logger(__name__)

STATE_NAME = "trainer_state.json"


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end, and its deletion has not begun."""
    try:
        return isinstance(json.loads(Path(checkpoint, STATE_NAME).read_text(encoding="utf-8")), dict)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def discard(checkpoint: str | Path) -> None:
    """Delete a checkpoint, if it is there, so that no part of it ever passes for a complete one."""
    Path(checkpoint, STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def is_same(one: str | Path, other: str | Path | None) -> bool:
    """Whether two paths are of one checkpoint; a run may be resumed under another spelling of its folder."""
    return other is not None and Path(one).resolve() == Path(other).resolve()


def discard_oldest(run_folder: str | Path, limit: int | None, best: str | None) -> None:
    """`rotate_checkpoints` of transformers by [`discard`]: keep `limit`, in any case the newest and `best`.

    Incomplete ones go first: by its time stamp, one whose deletion was cut off would be among the newest.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = sorted(sort_checkpoints(str(run_folder), use_mtime=True), key=is_complete)
    others = [path for path in checkpoints[:-1] if not is_same(path, best)]
    for checkpoint in others[: max(len(checkpoints) - limit, 0)]:
        discard(checkpoint)


def last_checkpoint(run_folder: str | Path) -> str | None:
    """The complete checkpoint of the highest step in `run_folder`, if there is one."""
    for checkpoint in reversed(sort_checkpoints(str(run_folder))):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning_once(  # the command asks before the trainer does
            f"{checkpoint} has no {STATE_NAME} that can be read: it was not written to its end, and is passed over."
        )
    return None


def checkpoint_to_resume(wish: str | bool | None, run_folder: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` stands for; `None` is the start.

    Args:
        wish (`str` or `bool`, *optional*): a checkpoint's folder; `True` or `"true"`, the last complete one of the
            run; `"auto"`, the same where there is one, else the start; `False`, `"false"` or `None`, the start.
        run_folder (`str` or `Path`): the run's `output_dir`.

    Raises:
        [`OrdMoEConfigError`]: that checkpoint is not there, or was not written to its end.
    """
    named = str(wish).lower()
    if wish is None or named == "false":
        return None
    checkpoint = last_checkpoint(run_folder) if named in ("true", "auto") else str(wish)
    if checkpoint is None and named == "true":
        raise OrdMoEConfigError(
            f"resume_from_checkpoint={wish}: no complete checkpoint in {run_folder}. Give 'auto' to start from the "
            "beginning where there is none."
        )
    if checkpoint is not None and not is_complete(checkpoint):
        raise OrdMoEConfigError(
            f"resume_from_checkpoint={wish}: no checkpoint, or one that was not written to its end, as it has no "
            f"{STATE_NAME} that can be read. Give 'auto' to go on from the last complete one in {run_folder}."
        )
    if checkpoint is not None and not any(Path(checkpoint).glob("rng_state*")):
        logger.warning_once(
            f"{checkpoint} holds the weights alone (save_only_model): the optimizer starts anew, so training goes on "
            "otherwise than it would have."
        )
    return checkpoint
