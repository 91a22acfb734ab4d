"""Errors that users cause, as one line: what happened, to what, what to do. Others are bugs: their traceback stays."""

import errno
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Collection
from typing import Any

import torch
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from jinja2 import TemplateError
from pyarrow import ArrowException
from safetensors import SafetensorError

from ..errors import OrdMoEError


FULL = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "the quota is used up", errno.EFBIG: "file too large"}
# What torch and safetensors, which raise no OSError, say of a write that failed.
WRITE_FAILED = ("file write failed", "failed writing", "unexpected pos", "iostream error", "os error 28", "os error 27")
NO_HOST_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc")
NOT_THERE = "to be installed"  # in a `RuntimeError` of transformers
RESUME = "Training goes on from its last whole checkpoint with --resume_from_checkpoint auto."
SMALLER = (
    "`ordmoe plan MODEL` says what fits. Less is taken with --load_in_4bit true, a smaller "
    "--per_device_train_batch_size or --per_device_eval_batch_size, and shorter samples (--max_length)."
)


def explained(error: BaseException, command: str = "train") -> str | None:
    """What happened in a command, to what, and what to do about it; `None` where it is no error that users cause."""
    for kinds, explain in EXPLAINED:
        if isinstance(error, kinds):
            line = explain(error)
            if line is not None:
                line = line if command == "train" else line.removesuffix(f" {RESUME}")
                return as_options(line, options_of(command)) if isinstance(error, OrdMoEError) else line
    return None


def options_of(command: str) -> set[str]:
    """The names of a command's options; none of `ablate`, whose values may stand in a grid or a cell instead."""
    if command == "ablate":
        return set()
    module: Any = sys.modules.get(f"ordmoe_peft.cli.{command}")
    parser = module.build_parser() if hasattr(module, "build_parser") else None
    return set() if parser is None else {name.lstrip("-") for name in parser.spellings}


def as_options(text: str, options: Collection[str]) -> str:
    """A message with settings as the command line spells them: `--bf16 false` for `bf16=False`."""

    def spelled(match: re.Match) -> str:
        name, value = match.groups()
        if name not in options or value == "None":
            return match[0]
        return f"--{name} {value.lower() if value in ('True', 'False') else value.strip(chr(39))}"

    return re.sub(r"\b(\w+)=('[^']*'|[\w./+-]*\w)", spelled, text)


def _memory(error: Any) -> str | None:
    first = one_line(error).split(". ")[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):
        return f"The memory of the device does not suffice: {first}. {SMALLER}"
    text = str(error).lower()
    is_full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if is_full or any(sign in text for sign in NO_HOST_MEMORY):
        return f"The RAM does not suffice{f': {first}' if first else ''}. {SMALLER}"
    return None


def _disk(error: Any) -> str | None:
    number, text = getattr(error, "errno", None), str(error).lower()
    if number not in FULL and not any(sign in text for sign in WRITE_FAILED):
        return None
    name = getattr(error, "filename", None)
    reason = FULL.get(number or 0, one_line(error).rpartition("] . ")[2].rstrip("."))
    what = f"{name}: {reason}" if name else reason
    return f"A file could not be written to its end ({what}). Make room, or write to another disk. {RESUME}"


def _file(error: Any) -> str | None:
    """Of files; many errors that upstream raises as `OSError` are sentences about something else."""
    if error.errno is None or error.strerror is None:
        return None
    remedies: dict[int, str] = {
        errno.ENOENT: "Check the path.",
        errno.EACCES: "Give a place that you may read or write, or change its permissions.",
        errno.EPERM: "Give a place that you may read or write, or change its permissions.",
        errno.EROFS: "Give another place.",
        errno.EISDIR: "Give a file.",
        errno.ENOTDIR: "Give a folder.",
        errno.EEXIST: "Give another place.",
    }
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}{': ' * bool(names)}{error.strerror.lower()}. {remedies.get(error.errno, '')}".rstrip()


def _hub(error: Any) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"{one_line(error)} Unset HF_HUB_OFFLINE, or give a folder."
    remedy = "Check the connection, or give a folder."
    if isinstance(error, GatedRepoError):
        remedy = "Ask for access on its page, and log in by `hf auth login`."
    elif isinstance(error, RepositoryNotFoundError):
        remedy = "Check the id; for a private repository, log in by `hf auth login`."
    elif isinstance(error, RevisionNotFoundError):
        remedy = "Check --model_revision."
    return f"The hub cannot be used: {one_line(error).rstrip('.')}. {remedy}"


def _recipe(error: Any) -> str:
    return f"The recipe is no YAML: {one_line(error)}. Check that line's indentation, quotes and brackets."


def _data_set(error: Any) -> str:
    cause = error.__cause__ or error.__context__
    return one_line(error) + (f" ({type(cause).__name__}: {one_line(cause)})" if cause is not None else "")


def _pickle(error: Any) -> str:
    return (
        f"A file of weights cannot be read ({type(error).__name__}: {one_line(error)}). It was not written or copied "
        "to its end, or is a pickle with code in it, which is never run. Get it again, as safetensors."
    )


def _package(error: Any) -> str | None:
    """A package that an option needs; one of ours that is not found is a bug."""
    text = one_line(error).rstrip(".")
    is_theirs = not (error.name or "").startswith("ordmoe") if isinstance(error, ImportError) else NOT_THERE in text
    return f"{text}. Install it, or leave out the option that needs it." if is_theirs else None


def one_line(error: Any) -> str:
    """An error's text without line breaks, its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# Kinds of errors → what to say of one, or `None`, in the order in which they are tried.
EXPLAINED: tuple[tuple[Any, Callable[[Any], str | None]], ...] = (
    (OrdMoEError, str),
    ((torch.OutOfMemoryError, MemoryError, RuntimeError, OSError), _memory),
    ((OSError, RuntimeError, SafetensorError, ArrowException), _disk),
    ((HfHubHTTPError, HTTPError, OfflineModeIsEnabled), _hub),
    (OSError, _file),
    (yaml.YAMLError, _recipe),
    (DatasetsError, _data_set),
    ((ImportError, RuntimeError), _package),
    ((pickle.UnpicklingError, zipfile.BadZipFile, EOFError, SafetensorError), _pickle),
    (TemplateError, lambda error: f"The chat template cannot be used: {one_line(error)}. Mend chat_template.jinja."),
    # Values that upstream refuses.
    ((OSError, ValueError, StrictDataclassError, ArrowException), one_line),
)
