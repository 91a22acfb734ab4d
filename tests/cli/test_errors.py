"""What users are told of errors of other libraries, and that bugs stay bugs."""

import errno
import pickle
import zipfile

import pytest
import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
from jinja2 import TemplateSyntaxError
from pyarrow import ArrowInvalid, ArrowNotImplementedError
from safetensors import SafetensorError

from ordmoe_peft.cli.errors import as_options, explained
from ordmoe_peft.errors import OrdMoEDataError


def with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OrdMoEDataError("Row 7 has no text."), ["Row 7 has no text."]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"), ["device", "ordmoe plan"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["RAM", "--load_in_4bit true"]),
        (MemoryError(), ["RAM", "ordmoe plan"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["RAM"]),
        (OSError(errno.ENOSPC, "No space left on device", "/x/a.json"), ["/x/a.json: no space left", "Make room"]),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), ["Make room"]),
        (SafetensorError("I/O error: No space left on device (os error 28)"), ["Make room"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), ["/x: permission denied", "permissions"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/f/x"), ["/f/x: not a directory", "Give a folder"]),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a", None, "b"), ["a -> b: is a directory"]),
        (HTTPError("[Errno -2] Name or service not known"), ["hub", "Name or service", "connection"]),
        (OfflineModeIsEnabled("Cannot reach x: offline mode is enabled."), ["HF_HUB_OFFLINE"]),
        (HFValidationError("Repo id must be\n in the form"), ["Repo id must be in the form"]),
        (yaml.YAMLError("mapping values\n are not allowed"), ["no YAML", "mapping values are"]),
        (with_cause(DatasetGenerationError("An error"), ArrowInvalid("row 3")), ["An error", "ArrowInvalid: row 3"]),
        (ArrowNotImplementedError("no such cast"), ["no such cast"]),
        (ImportError("FlashAttention2 is not\n installed"), ["FlashAttention2 is not installed", "Install it"]),
        (RuntimeError("WandbCallback requires wandb to be installed."), ["requires wandb", "Install it"]),
        (SafetensorError("header too large"), ["SafetensorError: header too large", "Get it again"]),
        (pickle.UnpicklingError("Weights only load failed"), ["never run"]),
        (zipfile.BadZipFile("File is not a zip file"), ["File is not a zip file"]),
        (EOFError(), ["EOFError"]),
        (TemplateSyntaxError("unexpected '}'", 1), ["chat template", "unexpected '}'"]),
        (ValueError("a\n  b"), ["a b"]),
        (FileNotFoundError("Couldn't find any data file at /x."), ["Couldn't find any data file at /x."]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_users_cause_is_told_in_one_line(error, parts):
    line = explained(error)
    assert len(line.splitlines()) == 1
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        TypeError("f() got an unexpected keyword"),
        KeyError("x"),
        AttributeError("no attribute"),
        AssertionError(),
        ModuleNotFoundError("No module named 'ordmoe_peft.x'", name="ordmoe_peft.x"),
    ],
    ids=repr,
)
def test_bugs_are_not_explained_away(error):
    assert explained(error) is None


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("num_tiers=5 does not fit: E=8.", "--num_tiers 5 does not fit: E=8."),
        ("set bf16=False, or objective='erl'.", "set --bf16 false, or --objective erl."),
        ("resume_from_checkpoint=/a/checkpoint-3: none", "--resume_from_checkpoint /a/checkpoint-3: none"),
        ("rewards=None and rewards=[1.0]", "rewards=None and rewards=[1.0]"),
    ],
)
def test_messages_name_options_as_they_are_given(text, spelled):
    options = {"num_tiers", "bf16", "objective", "resume_from_checkpoint", "rewards"}
    assert as_options(text, options) == spelled
