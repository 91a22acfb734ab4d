"""`ordmoe <command> …`: finds the command's module and turns expected errors into one line."""

import argparse
import importlib
import keyword
import sys
import traceback
from collections.abc import Sequence

import yaml

from ..errors import OrdMoEError


# Command → what it does. The module of its name is imported only when it runs.
COMMANDS = {
    "families": "say what of a model is covered and what is not, from its configuration alone",
    "plan": "say what training takes of a card's memory, from the configuration alone",
    "train": "train an OrdMoE adapter on a MoE model",
    "inspect": "say whether a model's routing can be cut into tiers, and why not",
    "evaluate": "exact match and likelihood of answers, per tier on request",
    "ablate": "compare settings with a baseline, over several seeds",
    "rollouts": "write what each tier answers, as a data set of ranked responses",
    "tiers": "what each tier is worth: order, answers, routing, diversity",
    "verify": "say whether an adapter does on a base what it did when it was saved",
    "merge": "write a base with an adapter merged into it, on disk, stack by stack",
    "export": "write an adapter in a form that plain PEFT, vLLM or SGLang loads",
    "import": "make a LoRA adapter of another tool an OrdMoE adapter",
}
# What users cause: our own errors, missing files and repositories, values that upstream refuses, broken YAML.
USER_ERRORS = (OrdMoEError, OSError, ValueError, yaml.YAMLError)


def build_parser() -> argparse.ArgumentParser:
    """The top-level parser; each command parses the rest itself."""
    parser = argparse.ArgumentParser(
        prog="ordmoe",
        description="OrdMoE: preference training of Mixture-of-Experts models from their own routing.",
        epilog="`ordmoe <command> --help` lists a command's options.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, help_text in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or after an error that was printed its exit status, mostly 2; 1 if a check failed."""
    options, rest = build_parser().parse_known_args(arguments)
    name = f"{options.command}_" if keyword.iskeyword(options.command) else options.command
    module = importlib.import_module(f"ordmoe_peft.cli.{name}")
    try:
        status = module.main(rest)
    except USER_ERRORS as error:
        if options.traceback:
            traceback.print_exc()
        print(f"ordmoe {options.command}: error: {error}", file=sys.stderr)
        return error.status if isinstance(error, OrdMoEError) else 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
