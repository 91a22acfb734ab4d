"""What a run leaves in `output_dir` for people: the options it had, where it ran, and what it logged.

`ordmoe_run.json` (`run_record.py`) is for the next start of the run; these files decide nothing.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from ..files import finite, write_whole


OPTIONS_NAME, ENVIRONMENT_NAME, METRICS_NAME = "run_config.yaml", "environment.json", "metrics.jsonl"
PACKAGES = (
    *("ordmoe-peft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"),
    *("huggingface-hub", "tokenizers", "safetensors", "numpy", "deepspeed"),
)
# Of one start rather than of the run: the file serves to start anew and to go on. And a secret.
NOT_OF_THE_RUN = ("resume_from_checkpoint", "overwrite_output_dir", "hub_token", "config")
# Not a folder as hf_datasets: a token has 34 letters, or more after `oauth_`.
HUB_TOKEN = re.compile(r"\bhf_(oauth_)?[A-Za-z0-9]{20,}[\w.-]*")
SECRET_OPTION = re.compile(r"--\w*(?<!eos_)(?<!pad_)(token|password|secret|api_key)")


def write_run_files(
    folder: str | Path, environment: Mapping[str, Any], options: Mapping[str, Any] | None, is_new: bool
) -> None:
    """Write `environment.json`, and `run_config.yaml` where `options` are known; of a new run no earlier one stays."""
    write_whole(Path(folder, ENVIRONMENT_NAME), json.dumps(environment, indent=2) + "\n")
    if options is not None:
        write_options(folder, options)
    elif is_new:
        Path(folder, OPTIONS_NAME).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- the options
def write_options(folder: str | Path, options: Mapping[str, Any]) -> None:
    """Write the options that `ordmoe train --config` takes to `run_config.yaml`, without those of one start alone."""
    kept = {name: value for name, value in options.items() if name not in NOT_OF_THE_RUN}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)
    write_whole(Path(folder, OPTIONS_NAME), HUB_TOKEN.sub("<hidden>", text))  # *** would be an alias of YAML's


# ----------------------------------------------------------------------------------------------------- the environment
def environment(
    data: Mapping[str, Any], num_processes: int, data_path: str | None = None, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Where a run takes place, as JSON has it.

    Args:
        data (`dict`): what [`~ordmoe_peft.training.run_record.describe_data`] says of its data.
        num_processes (`int`): processes that train.
        data_path (`str`, *optional*): file or folder of the data, for its revision in git.
        command (`list[str]`, *optional*): the command line; by default that of this process.

    Returns:
        `dict`: `started`, in UTC; `command`, without tokens; `python`, `packages` and `platform`; `cpu`, with the
        number of `cores` and `memory_bytes`; `gpus`; `processes`; `data`, with `git`, which is `None` where git tracks
        nothing of it.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_secrets(sys.argv if command is None else command),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version_of(name))},
        "platform": platform.platform(),
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "processes": num_processes,
        "data": {**data, "git": git_state(data_path) if data_path and Path(data_path).exists() else None},
    }


def without_secrets(command: Sequence[str]) -> list[str]:
    """The words of a command line, the program's name alone, and `***` in place of tokens and passwords."""
    words, is_secret = [Path(word).name for word in command[:1]], False
    for word in command[1:]:
        name, equals, _ = word.partition("=")
        is_option = SECRET_OPTION.fullmatch(name) is not None
        words.append(f"{name}=***" if is_option and equals else "***" if is_secret else without_hub_tokens(word))
        is_secret = is_option and not equals
    return words


def without_hub_tokens(text: str) -> str:
    """A text with `***` in place of the tokens of the hub in it, such as those within `model_init_kwargs`."""
    return HUB_TOKEN.sub("***", text)


def git_state(path: str | Path) -> dict[str, Any] | None:
    """`revision` of the repository that tracks a file or folder, and whether what is there is `dirty`: otherwise than
    in that revision. `None` without git, outside a repository, and for what it does not track."""
    path = Path(path).resolve()
    folder, name = (path, ".") if path.is_dir() else (path.parent, path.name)
    if not _git(folder, "ls-files", "--", name):
        return None
    revision = _git(folder, "rev-parse", "--verify", "HEAD")
    return {"revision": revision, "dirty": _git(folder, "status", "--porcelain", "--", name) != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Linux has it in a file; elsewhere Python knows it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(errors="replace").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_bytes": properties.total_memory}


# --------------------------------------------------------------------------------------------------------- the metrics
class MetricsFile(TrainerCallback):
    """Writes what the trainer logs to `metrics.jsonl`, an object a line, as it is logged.

    When training begins the file becomes what the state of the run has, so that a run that is resumed has each entry
    once, and nothing of steps after its checkpoint. Numbers that are not finite are `null`.

    `is_kept` is whether there is something to write: not where a finished run is started again.

    Args:
        folder (`str` or `Path`): `output_dir`.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder, METRICS_NAME)
        self.is_kept = self.is_open = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_open = self.is_kept and state.is_world_process_zero
        if self.is_open:
            write_whole(self.path, "".join(map(_line, state.log_history)))

    def on_log(self, args, state, control, **kwargs):
        if self.is_open:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(entry: Mapping[str, Any]) -> str:
    first = {name: entry[name] for name in ("step", "epoch") if name in entry}
    return json.dumps(finite({**first, **entry}), allow_nan=False) + "\n"
