"""A training run's checkpoints, each there whole or not at all.

The trainer writes a checkpoint file by file, and deletes an old one likewise, so a process killed on the way would
leave part of one under the name that resuming looks for. So both happen in a folder aside, `_unfinished`: a checkpoint
gets its name when it is complete, and loses it before its first file goes.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from ..errors import OrdMoEConfigError


logger = logging.get_logger(__name__)

# The underscore keeps uploads of the run's folder from it, as they skip what begins with one.
UNFINISHED = "_unfinished"
# The last file of a checkpoint that the trainer writes.
STATE_NAME = "trainer_state.json"


def unfinished_folder(run_folder: str | Path) -> Path:
    """Where checkpoints of a run are written and deleted."""
    return Path(run_folder, UNFINISHED)


def move_to_place(run_folder: str | Path, name: str) -> None:
    """Give the complete checkpoint `name` its place. Machines that share the folder may all do so."""
    with suppress(FileNotFoundError):
        os.rename(unfinished_folder(run_folder) / name, Path(run_folder, name))


def discard(checkpoint: str | Path) -> None:
    """Delete a checkpoint, if it is there, so that no part of it ever stands under its name."""
    checkpoint = Path(checkpoint)
    clear_unfinished(checkpoint.parent)
    if checkpoint.exists():
        unfinished_folder(checkpoint.parent).mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            # A folder of its own: of what was discarded before, some may have stayed.
            aside = tempfile.mkdtemp(prefix="discarded-", dir=unfinished_folder(checkpoint.parent))
            os.rename(checkpoint, Path(aside, checkpoint.name))
    clear_unfinished(checkpoint.parent)


def clear_unfinished(run_folder: str | Path) -> None:
    """Delete what killed processes left, but for files that cannot be deleted, such as open ones on some disks."""
    shutil.rmtree(unfinished_folder(run_folder), ignore_errors=True)


def is_same(one: str | Path, other: str | Path | None) -> bool:
    """Whether two paths are of one checkpoint; a run may be resumed under another spelling of its folder."""
    return other is not None and Path(one).resolve() == Path(other).resolve()


def discard_oldest(run_folder: str | Path, limit: int | None, best: str | None) -> None:
    """Keep at most `limit` checkpoints, in any case the newest and `best`: `rotate_checkpoints` of transformers."""
    if limit is None or limit <= 0:
        return
    checkpoints = sort_checkpoints(str(run_folder), use_mtime=True)
    others = [path for path in checkpoints[:-1] if not is_same(path, best)]
    for checkpoint in others[: max(len(checkpoints) - limit, 0)]:
        discard(checkpoint)


def last_checkpoint(run_folder: str | Path) -> str | None:
    """The complete checkpoint of the highest step in `run_folder`, if there is one.

    Other trainers write checkpoints in place: of theirs, those without their last file are passed over.
    """
    for checkpoint in reversed(sort_checkpoints(str(run_folder))):
        if Path(checkpoint, STATE_NAME).is_file():
            return checkpoint
        logger.warning(f"{checkpoint} has no {STATE_NAME}: it was not written to its end, and is passed over.")
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
    if named in ("true", "auto"):
        checkpoint = last_checkpoint(run_folder)
        if checkpoint is None and named == "true":
            raise OrdMoEConfigError(
                f"resume_from_checkpoint={wish}: no complete checkpoint in {run_folder}. Give 'auto' to start from the "
                "beginning where there is none."
            )
    elif Path(wish, STATE_NAME).is_file():
        checkpoint = str(wish)
    else:
        raise OrdMoEConfigError(
            f"resume_from_checkpoint={wish}: no checkpoint, or one that was not written to its end, as it has no "
            f"{STATE_NAME}. Give 'auto' to go on from the last complete one in {run_folder}."
        )
    if checkpoint is not None and not any(Path(checkpoint).glob("rng_state*")):
        logger.warning(
            f"{checkpoint} holds the weights alone (save_only_model): the optimizer starts anew, so training goes on "
            "otherwise than it would have."
        )
    return checkpoint
