"""See `__init__.py`."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module

import torch
from transformers import HfArgumentParser

from ordmoe_peft.cli.tables import print_table, write_json

from .rows import FAILED, SIZES, Row, last_line


# Letter → module and function, and the seconds that it may take.
SECTIONS = {
    "a": ("equality", "check", 120),
    "b": ("one_layer", "time_layer", 60),
    "c": ("one_layer", "compare_sizes", 75),
    "d": ("waits", "find_waits", 75),
    "e": ("training", "train", 110),
    "f": ("in_ram", "compare", 110),
    "g": ("further", "run", 150),
}
# Before what a child says that is a row.
MARK = "ROW "


@dataclass
class Options:
    """What to run."""

    size: str | None = field(default=None, metadata={"help": f"Of {list(SIZES)}; real where there is a CUDA device."})
    sections: list[str] = field(default_factory=lambda: list(SECTIONS), metadata={"help": "Letters."})
    minutes: float = field(default=9.0, metadata={"help": "The most that all sections may take."})
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures, as JSON."})
    only: str | None = field(default=None, metadata={"help": "Internal: run this section here, a line for each row."})


def main() -> int:
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    size = options.size or ("real" if torch.cuda.is_available() else "toy")
    if options.only is not None:
        run_here(options.only, size)
        return 0
    rows = run_all(options.sections, size, options.minutes)
    print_table(f"\n{size} sizes", ["case", "figure", "verdict"], [row.cells() for row in rows])
    if options.output_file is not None:
        write_json(options.output_file, {"size": size, "rows": [row.to_dict() for row in rows]})
    return int(any(row.has_failed for row in rows))


def run_all(letters: list[str], size: str, minutes: float) -> list[Row]:
    """All rows of these sections, each printed when it is known."""
    end, rows = time.monotonic() + 60 * minutes, []
    for letter in letters:
        command = [sys.executable, "-m", "examples.benchmarks.gpu_session", "--only", letter, "--size", size]
        limit = min(SECTIONS[letter][2], end - time.monotonic())
        for row in run_apart(command, limit):
            rows.append(replace(row, section=letter))
            print(*(cell for cell in rows[-1].cells() if cell), sep=" | ", flush=True)
    return rows


def run_here(letter: str, size: str) -> None:
    module, function, _ = SECTIONS[letter]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for row in getattr(import_module(f".{module}", __package__), function)(SIZES[size], device):
        print(MARK + json.dumps(row.to_dict()), flush=True)


def run_apart(command: list[str], limit: float) -> Iterator[Row]:
    """The rows of a process, as they come, and one more where it crashes or takes longer than `limit` seconds."""
    began = time.monotonic()
    if limit <= 0:
        yield Row("all", "", f"{FAILED}: no time was left")
        return
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # nothing waits for a network
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=offline
        )
        timer = threading.Timer(limit, end_group, [process])
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    yield Row(**json.loads(line.removeprefix(MARK)))
            status = process.wait()
        finally:
            timer.cancel()
            end_group(process)
        errors.seek(0)
        said = errors.read()
    seconds = time.monotonic() - began
    if status and seconds >= limit:
        yield Row("all", f"{seconds:.0f} s", f"{FAILED}: it ran past its {limit:.0f} s")
    elif status:
        print(*said.splitlines()[-20:], sep="\n", file=sys.stderr)
        yield Row("all", f"{seconds:.0f} s", f"{FAILED}: {last_line(said)}")
    else:
        yield Row("all", f"{seconds:.0f} s", numbers={"seconds": seconds})


def end_group(process: subprocess.Popen) -> None:
    """End a process and what it has started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    # A section is in a session of its own: who ends this process by a signal ends that, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
