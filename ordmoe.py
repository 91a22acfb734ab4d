# PYTHON_ARGCOMPLETE_OK
"""The `ordmoe` command: finds a command's module, runs it, and turns expected errors into one line.

The standard library alone is imported until a command runs: importing PEFT takes seconds. So the help texts of commands
are shipped, and completion reads them, too. In bash or zsh, with the extra `completion`:

    eval "$(register-python-argcomplete ordmoe)"
"""

import argparse
import difflib
import gc
import importlib
import io
import keyword
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any


# Command → what it does. The module of its name is imported only when it runs.
COMMANDS = {
    "families": "say what of a model is covered and what is not, from its configuration alone",
    "plan": "say what training takes of a card's memory, from the configuration alone",
    "inspect": "say whether a model's routing can be cut into tiers, and why not",
    "tiers": "what each tier is worth: order, answers, routing, diversity",
    "train": "train an OrdMoE adapter on a MoE model",
    "evaluate": "exact match and likelihood of answers, per tier on request",
    "precision": "what 4 bits change in a model: experts, routing, loss",
    "ablate": "compare settings with a baseline, over several seeds",
    "rollouts": "write what each tier answers, as a data set of ranked responses",
    "verify": "say whether an adapter does on a base what it did when it was saved",
    "merge": "write a base with an adapter merged into it, on disk, stack by stack",
    "export": "write an adapter in a form that plain PEFT, vLLM or SGLang loads",
    "import": "make a LoRA adapter of another tool an OrdMoE adapter",
}
HELP_TEXTS = Path(__file__).parent / "ordmoe_peft" / "cli" / "help"
# Whose options are among ours, so that help depends on their versions.
LIBRARIES = ("transformers", "trl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): what stands after `ordmoe`; that of this process by default.

    Returns:
        `int`: the exit code: 0, 1 where a check did not hold, after an error that was printed its own, mostly 2; as
        shells have it, 128 and the signal's number after Ctrl-C (130), SIGTERM (143), and where nobody reads what is
        printed (141).
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        complete()
    sys.stdout = sys.stdout or io.StringIO()  # it was closed, as by `>&-`
    try:
        with stopping_at_sigterm():
            try:
                return parse_and_run(arguments)
            finally:
                flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + 13  # SIGPIPE, which Windows has not


@contextmanager
def stopping_at_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM ends this process as an error does, so that what it left unfinished is removed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != process:  # one that was forked, whose parent goes on
            os._exit(128 + number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def flush() -> None:
    """Write what was printed. Where that fails, the rest is given up, lest Python try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def parse_and_run(arguments: Sequence[str] | None) -> int:
    """Run the command that the arguments name."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        print(f"ordmoe {version()}")
        return 0
    if options.command is None:
        parser.print_help()
        return 0
    if options.command not in COMMANDS:
        near = difflib.get_close_matches(options.command, COMMANDS, n=1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        parser.error(f"unknown command {options.command!r}; {known}")
    text = shipped_help(options.command) if {"-h", "--help"}.intersection(options.arguments) else None
    if text is not None:
        print(text, end="")
        return 0
    return run(options.command, options.arguments, options.traceback)


def build_parser() -> argparse.ArgumentParser:
    """The parser of what stands before a command's own options."""
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ordmoe",
        usage="ordmoe COMMAND [options]",
        description="OrdMoE: preference training of Mixture-of-Experts models from their own routing.\n\n"
        f"commands:\n{commands}",
        epilog="`ordmoe COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def version() -> str:
    """The version of the package."""
    try:
        return metadata.version("ordmoe-peft")
    except metadata.PackageNotFoundError:  # a copy of the sources that was not installed
        return importlib.import_module("ordmoe_peft").__version__


def module_of(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"ordmoe_peft.cli.{command}{'_' * keyword.iskeyword(command)}")


def made_with() -> str:
    """The installed versions of the libraries that help depends on, as the first line of a help text has them."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)


def shipped_help(command: str) -> str | None:
    """The help of a command, unless it was made with other versions; `python -m tests.help_texts` makes it."""
    try:
        versions, _, text = (HELP_TEXTS / f"{command}.txt").read_text(encoding="utf-8").partition("\n")
        return text if versions == made_with() else None
    except (FileNotFoundError, metadata.PackageNotFoundError):
        return None


def complete() -> None:
    """Answer argcomplete's question: the words of the line, and from which on they are ours, are in the environment."""
    import argcomplete

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = re.split(r"\s+", line.lstrip())[:-1]  # those that are complete
    start = int(os.environ["_ARGCOMPLETE"])
    place = next((index for index, word in enumerate(words) if index >= start and word in COMMANDS), None)
    if place is None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--version", action="store_true")
        parser.add_argument("--traceback", action="store_true")
        parser.add_argument("command", choices=list(COMMANDS))
    else:
        parser = parser_for_completion(words[place])
        os.environ["_ARGCOMPLETE"] = str(place + 1)
    argcomplete.autocomplete(parser)


def parser_for_completion(command: str) -> argparse.ArgumentParser:
    """A parser of a command's options and their choices, read from its help text where that is the installed one's."""
    text = shipped_help(command)
    if text is None:
        return module_of(command).build_parser()
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    for name, value in re.findall(r"^  (--\w+) ?(.*?)(?:  .*)?$", text, flags=re.MULTILINE):
        choices = re.search(r"\{(.*?)\}", value)
        parser.add_argument(
            name,
            nargs="?" if value.startswith("[") else "+" if value.endswith("...]") else None,
            choices=choices[1].split(",") if choices else ["true", "false"] if "BOOL" in value else None,
        )
    return parser


def run(command: str, arguments: Sequence[str], with_traceback: bool = False) -> int:
    """Run the module of a command; an error that users cause is one line on stderr, and an exit code, mostly 2."""
    tidy_notes()
    with OneLineErrors(command, with_traceback) as errors:
        status = module_of(command).main(arguments) or 0
        flush()
        return status
    return errors.status


def tidy_notes() -> None:
    """Warnings without the line of code that gave them, and none about which a user can do nothing."""
    warnings.formatwarning = lambda message, category, *where: f"Warning: {message}\n"
    # bitsandbytes 0.50 misses a faster kernel of the hub for one row in bf16 on the CPU, and uses its own.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # peft 0.21 asks a model by the name that transformers 5 has for version 6 no more.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


class OneLineErrors(AbstractContextManager):
    """Makes an error that users cause a line on stderr. Others are bugs and pass, with a word before their traceback.

    Args:
        command (`str`): the command.
        with_traceback (`bool`): also print where the error came from.
    """

    def __init__(self, command: str, with_traceback: bool):
        self.command, self.with_traceback, self.status = command, with_traceback, 2

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception) or isinstance(error, BrokenPipeError):
            return False
        from ordmoe_peft.cli.errors import explained

        line = explained(error, self.command)
        if line is None:
            print(
                f"ordmoe {self.command}: this should not have happened. Please report it, with the command and what "
                "follows.",
                file=sys.stderr,
            )
            return False
        if self.with_traceback:
            traceback.print_exception(kind, error, trace)
        status = getattr(error, "status", self.status)
        traceback.clear_frames(trace)
        gc.collect()  # what shows progress ends its line
        print(f"ordmoe {self.command}: error: {line}", file=sys.stderr)
        self.status = status
        return True


if __name__ == "__main__":
    sys.exit(main())
