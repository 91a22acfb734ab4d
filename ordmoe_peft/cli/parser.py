"""The parser of all commands: TRL's, with the model first, one spelling of each option, and short errors."""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from inspect import get_annotations
from itertools import takewhile
from types import NoneType
from typing import Any, get_args, get_type_hints

from trl import TrlParser

from .option_checks import check_options, check_recipe, recipe_value


MODEL = {"model_name_or_path": "MODEL"}
ADAPTER = {"adapter": "ADAPTER", "model_name_or_path": "[MODEL]"}
# Class → the group of the options that it declares. Others of this package are the command's own.
GROUPS = {
    "OrdMoETrainingArguments": "OrdMoE's training",
    "AdapterArguments": "adapter",
    "AdapterSizeArguments": "adapter",
    "ModelArguments": "model",
    "ScriptArguments": "data",
}
DATA = ("dataset_", "limit", "train_limit", "validation_limit", "test_limit")
# Where a group stands in help; the command's own options stand before these.
LIBRARIES = {"trl": "from trl.SFTConfig", "transformers": "from transformers.TrainingArguments"}
ORDER = ("OrdMoE's training", "adapter", "model", "data", "general", *LIBRARIES.values())
# What other tools call an option → what it is called here.
CALLED_ELSEWHERE = {
    **{"lr": "learning_rate", "rank": "lora_r", "lora_rank": "lora_r", "target_modules": "targets"},
    **{"dataset": "dataset_name", "data": "dataset_name", "split": "dataset_split"},
    **{"eval_dataset": "dataset_test_split", "use_4bit": "load_in_4bit", "model": "model_name_or_path"},
    **{"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs", "output": "output_dir"},
    **{"max_seq_length": "max_length"},
}
MOST_IN_BRACES = 10
METAVARS = {"int": "INT", "float": "FLOAT", "str": "TEXT", "string_to_bool": "BOOL"}


class CommandParser(TrlParser):
    """[`~trl.TrlParser`] with what all commands share.

    Args:
        command (`str`): the command's name.
        dataclass_types (`Sequence[type]`): the dataclasses of its options.
        positionals (`Mapping[str, str]`): options that may stand without their names, in this order, and what help
            calls them; those in brackets can be left out.
        needed (`str`): the options that nearly every call has, as the usage line shows them.
        passed_over (`Sequence[type]`): dataclasses of another command, whose options are read and not used.
        kwargs: of [`argparse.ArgumentParser`].

    Errors end the process with exit code 2 and one line, as argparse's do.
    """

    def __init__(
        self,
        command: str,
        dataclass_types: Sequence[type],
        positionals: Mapping[str, str] = MODEL,
        needed: str = "",
        passed_over: Sequence[type] = (),
        **kwargs: Any,
    ):
        self.positionals = positionals
        super().__init__(
            dataclass_types,
            prog=f"ordmoe {command}",
            usage=" ".join(filter(None, ("ordmoe", command, *positionals.values(), needed, "[options]"))),
            formatter_class=partial(argparse.HelpFormatter, width=100, max_help_position=28),
            allow_abbrev=False,
            **kwargs,
        )
        self.add_argument("names", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        # TRL takes it off before argparse sees it.
        self.add_argument("--config", metavar="FILE", help="YAML file of options; those given here count for more")
        own = {action.dest for action in self._actions}
        others = {item.name: item.type for options in passed_over for item in fields(options) if item.init}
        self.passed_over = {name for name in others if name not in own}
        for name in sorted(self.passed_over):
            nargs = "*" if "list" in str(others[name]) else "?"
            spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
            self.add_argument(*spellings, dest=name, nargs=nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.spellings = {option: action for action in self._actions for option in action.option_strings}
        self.never_null = {
            name
            for dataclass_type in self.dataclass_types
            for name, kind in get_type_hints(dataclass_type).items()
            if NoneType not in get_args(kind)
        }
        self.group_of = {
            item.name: _group(item.name, dataclass_type)
            for dataclass_type in self.dataclass_types
            for item in fields(dataclass_type)
        }
        self.text_of = {action.dest: action.help for action in self._actions if action.dest in positionals}
        for action in self._actions:
            _tidy(action)
            action.required = action.required and action.dest not in positionals

    def parse_args_and_config(self, args: Sequence[str], **kwargs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """The dataclasses, filled from `args` and from the file of `--config`."""
        finder = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        found, rest = finder.parse_known_args(args)
        config = []
        if found.config is not None:
            check_recipe(found.config)
            config = ["--config", found.config]
        # `--config=FILE`, too, in the form that TRL knows. What nothing knows has ended the process.
        filled = super().parse_args_and_config([*config, *rest], return_remaining_strings=True, **kwargs)
        options = filled[: len(self.dataclass_types)]
        check_options(*options)
        return options

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """TRL's; a key that is no option is an error, and so is a value that the command line would not take."""
        where = " in the file of --config"
        self._check_known([f"--{name}" for name in config], where)
        values = {}
        for name, value in config.items():
            action = self.spellings[f"--{name}"]
            if action.nargs == 0 or action.dest == "config":
                self.error(f"--{name} can stand on the command line alone, not{where}")
            if value is None and action.dest in self.never_null:
                self.error(f"--{name} has no value{where}; give one, or leave the line out")
            problem, values[action.dest] = recipe_value(action, value)
            if problem is not None:
                self.error(f"argument {action.option_strings[0]}: {problem}{where}")
        return super().set_defaults_with_config(**values)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """argparse's; what stands without an option's name fills the positionals."""
        self._check_known(args)
        found, rest = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(self.positionals)))
        for name in ("config", *self.passed_over):
            vars(found).pop(name, None)
        names = [*vars(found).pop("names", []), *(part for part in rest if part != "--")]
        free = [dest for dest in self.positionals if getattr(found, dest) is None]
        if len(names) > len(free):
            self.error(f"{names[len(free)]!r} is one argument too many")
        vars(found).update(zip(free, names, strict=False))
        for dest, shown in self.positionals.items():
            if getattr(found, dest) is None:
                setattr(found, dest, self.get_default(dest))
            if not getattr(found, dest) and not shown.startswith("["):
                self.error(f"{shown} is missing: {self.text_of[dest]}")
        return found, rest

    def _check_known(self, args: Sequence[str], where: str = "") -> None:
        given = takewhile(lambda part: part != "--", args)
        options = (part.partition("=")[0] for part in given if re.match(r"-+[A-Za-z]", part) and " " not in part)
        for option in options:
            if option in self.spellings:
                continue
            name = option.lstrip("-").replace("-", "_")
            known = [action.dest for action in self._actions if action.help is not argparse.SUPPRESS]
            near = [CALLED_ELSEWHERE[name]] if CALLED_ELSEWHERE.get(name) in known else []
            near += sorted((other for other in known if f"_{other}".endswith(f"_{name}")), key=len)
            near += difflib.get_close_matches(name, known, 1)
            hint = f"did you mean --{near[0]}?" if near else f"`{self.prog} --help` lists all."
            self.error(f"unknown option {option}{where}; {hint}")

    def format_help(self) -> str:
        """Help with the needed arguments first, then the command's own options, then those of other origins."""
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        first = [
            argparse.Action([], dest, metavar=shown.strip("[]"), help=f"{self.text_of[dest]} Also --{dest}.")
            for dest, shown in self.positionals.items()
        ]
        groups: dict[str, list[argparse.Action]] = {"arguments": first, "options": [], **{name: [] for name in ORDER}}
        for action in self._actions:
            is_needed = f"--{action.dest} " in self.usage
            if action.dest not in self.positionals:
                groups["arguments" if is_needed else self.group_of.get(action.dest, "general")].append(action)
        for name, actions in groups.items():
            formatter.start_section(name)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def _group(name: str, dataclass_type: type) -> str:
    """The group of the option `name`, by the class that declares it first."""
    origin = next(cls for cls in reversed(dataclass_type.__mro__) if name in get_annotations(cls))
    library = origin.__module__.partition(".")[0]
    if library in LIBRARIES and origin.__name__ not in GROUPS:
        return LIBRARIES[library]
    return "data" if name.startswith(DATA) else GROUPS.get(origin.__name__, "options")


def _tidy(action: argparse.Action) -> None:
    """One spelling, a short word for the value, and the default where there is one; a truth value may stand alone."""
    kind = getattr(action.type, "__name__", "")
    if action.dest != "help":
        action.option_strings = action.option_strings[:1]
    if action.nargs == 0 and action.const is False:  # --no_…, for which there is `false`
        action.help = argparse.SUPPRESS
    if kind == "string_to_bool":
        action.nargs, action.const = "?", True
    choices = [] if action.choices is None else list(map(str, action.choices))
    if len(choices) > MOST_IN_BRACES:  # argparse breaks no line of choices
        action.metavar, action.help = "NAME", f"{action.help} One of {', '.join(choices)}."
    elif action.nargs == "+" and choices:
        action.metavar = ("{" + ",".join(choices) + "}", "MORE")
    elif not choices:
        action.metavar = action.metavar or METAVARS.get(kind)
    if action.help is not argparse.SUPPRESS and action.default not in (None, "", [], argparse.SUPPRESS):
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
        action.help = f"{action.help or ''} (default: {default.replace('%', '%%')})"
