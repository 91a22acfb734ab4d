"""What options tell by themselves, before anything is read."""

from argparse import Action
from pathlib import Path
from typing import Any

import yaml

from ..errors import OrdMoEConfigError
from ..files import check_place


# Options that name what is written → whether it is a folder.
PLACES = {"output_dir": True, "report": True, "output_file": False}
WANTED = "Write a line `option: value` for each option."
COUNTS = ("limit", "per_device_eval_batch_size", "max_new_tokens", "max_completion_length", "num_tiers")


def check_options(*options: Any) -> None:
    """See that what is to be written can be, that a report can be drawn, and that counts are positive.

    Args:
        options: the parsed options, in groups.

    Raises:
        [`OrdMoEConfigError`]: names the option and its value.
    """
    given = {name: value for group in options for name, value in vars(group).items()}
    for name, is_folder in PLACES.items():
        if given.get(name):
            check_place(given[name], f"--{name}", is_folder)
    if given.get("report"):
        from ..tools.report import require_matplotlib

        require_matplotlib()
    for name in COUNTS:
        if given.get(name) is not None and given[name] < 1:
            raise OrdMoEConfigError(f"--{name} must be at least 1, got {given[name]}.")


def check_recipe(path: str) -> None:
    """Raise [`OrdMoEConfigError`] unless the file of `--config` is a YAML mapping."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise OrdMoEConfigError(f"--config {path} cannot be read: {reason}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}: {error.problem}" if mark is not None else ""
        raise OrdMoEConfigError(f"--config {path} is no YAML{where}. {WANTED}") from error
    if not isinstance(recipe, dict):
        kind = "is empty" if recipe is None else f"holds a value of type {type(recipe).__name__}, not options"
        raise OrdMoEConfigError(f"--config {path} {kind}. {WANTED}")
    unnamed = [name for name in recipe if not isinstance(name, str)]
    if unnamed:
        raise OrdMoEConfigError(f"--config {path} has {unnamed[0]!r} for the name of an option. {WANTED}")


def recipe_value(action: Action, value: Any) -> tuple[str | None, Any]:
    """What is wrong with a value of a recipe, or None, and the value as the command line would give it.

    argparse takes a default for what it is, and a recipe's values are defaults.

    Args:
        action (`argparse.Action`): the option.
        value: as YAML has it: a text, a number, a truth value, null, or a list of them.
    """
    kind = getattr(action.type, "__name__", "")
    if value is None:
        return None, None
    if action.nargs in ("+", "*") and kind in ("int", "float", "str"):
        if value == []:
            return "expected at least one argument", value
        found = [_one_value(action, kind, one) for one in (value if isinstance(value, list) else [value])]
        return next((problem for problem, _ in found if problem is not None), None), [one for _, one in found]
    return _one_value(action, kind, value)


def _one_value(action: Action, kind: str, value: Any) -> tuple[str | None, Any]:
    if action.choices:
        value = "no" if value is False and "no" in action.choices else value  # YAML's `no` is a truth value
        listed = ", ".join(map(repr, action.choices))
        return (None if value in action.choices else f"invalid choice: {value!r} (choose from {listed})"), value
    if kind == "string_to_bool":
        return (None if isinstance(value, bool | str) else f"invalid truth value: {value!r}"), value
    if kind not in ("int", "float"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None, str(value) if kind == "str" and is_number else value
    try:
        is_whole = kind == "float" or isinstance(value, int | str)
        if is_whole and not isinstance(value, bool):
            return None, {"int": int, "float": float}[kind](value)
    except (TypeError, ValueError):
        pass
    return f"invalid {kind} value: {value!r}", value
