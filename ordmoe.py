"""The `ordmoe` command: finds a command's module, runs it, and turns expected errors into one line.

The standard library alone is imported until a command runs.
"""

import argparse
import difflib
import importlib
import keyword
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata


# Command → what it does. The module of its name is imported only when it runs.
COMMANDS = {
    "families": "say what of a model is covered and what is not, from its configuration alone",
    "plan": "say what training takes of a card's memory, from the configuration alone",
    "inspect": "say whether a model's routing can be cut into tiers, and why not",
    "tiers": "what each tier is worth: order, answers, routing, diversity",
    "train": "train an OrdMoE adapter on a MoE model",
    "evaluate": "exact match and likelihood of answers, per tier on request",
    "ablate": "compare settings with a baseline, over several seeds",
    "rollouts": "write what each tier answers, as a data set of ranked responses",
    "verify": "say whether an adapter does on a base what it did when it was saved",
    "merge": "write a base with an adapter merged into it, on disk, stack by stack",
    "export": "write an adapter in a form that plain PEFT, vLLM or SGLang loads",
    "import": "make a LoRA adapter of another tool an OrdMoE adapter",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): what stands after `ordmoe`; that of this process by default.

    Returns:
        `int`: the exit code: 0, 2 after an error that was printed, 1 where a check did not hold.
    """
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


def run(command: str, arguments: Sequence[str], with_traceback: bool = False) -> int:
    """Run the module of a command; an error that users cause is one line on stderr, and exit code 2."""
    module = importlib.import_module(f"ordmoe_peft.cli.{command}{'_' * keyword.iskeyword(command)}")
    import yaml

    from ordmoe_peft.errors import OrdMoEError

    try:
        return module.main(arguments) or 0
    # Our own errors, missing files and repositories, values that upstream refuses, broken YAML.
    except (OrdMoEError, OSError, ValueError, yaml.YAMLError) as error:
        if with_traceback:
            traceback.print_exc()
        print(f"ordmoe {command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
