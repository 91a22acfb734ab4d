# PYTHON_ARGCOMPLETE_OK
"""The `ordmoe` command: finds a command's module, runs it, and turns expected errors into one line.

The standard library alone is imported until a command runs: importing PEFT takes seconds. So the help texts of commands
are shipped, and completion reads them, too. In bash or zsh, with the extra `completion`:

    eval "$(register-python-argcomplete ordmoe)"
"""

import argparse
import difflib
import importlib
import keyword
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType


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
        `int`: the exit code: 0, 1 where a check did not hold, after an error that was printed its own, mostly 2.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        complete()
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
    module = module_of(command)
    import yaml

    from ordmoe_peft.errors import OrdMoEError

    try:
        return module.main(arguments) or 0
    # Our own errors, missing files and repositories, values that upstream refuses, broken YAML.
    except (OrdMoEError, OSError, ValueError, yaml.YAMLError) as error:
        if with_traceback:
            traceback.print_exc()
        print(f"ordmoe {command}: error: {error}", file=sys.stderr)
        return error.status if isinstance(error, OrdMoEError) else 2


if __name__ == "__main__":
    sys.exit(main())
