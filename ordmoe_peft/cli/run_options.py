"""The options of a run of `ordmoe train`: what was given, and the commands to go on with."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from ..training import OrdMoETrainingArguments
from ..training.checkpoints import last_checkpoint
from ..training.run_files import NOT_OF_THE_RUN, OPTIONS_NAME, without_hub_tokens
from .arguments import ModelArguments
from .parser import CommandParser


# Of how the base is loaded, what `ordmoe verify` takes from the adapter's record.
KNOWN_TO_ADAPTERS = (
    *("dtype", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
    "use_bnb_nested_quant",
)


# Stands for data that a run did not train on.
HELD_OUT = "HELD_OUT_DATA"


def given_options(parser: CommandParser, arguments: Sequence[str], kinds: Sequence[type]) -> dict[str, Any]:
    """The options that were given, on the command line or in the recipe, and are not the defaults.

    Args:
        parser ([`CommandParser`]): has parsed `arguments` before, so that its defaults are those of the recipe.
        arguments (`list[str]`): the command line.
        kinds (`list[type]`): the dataclasses of the options.
    """
    values = vars(parser.parse_known_args(list(arguments))[0])
    return {
        item.name: values[item.name]
        for kind in kinds
        for item in fields(kind)
        if item.name in values and not _is_default(item, values[item.name])
    }


def _is_default(item: Field, value: Any) -> bool:
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    # The latter is what the parser makes of such defaults.
    return value == default or (default, value) in (("no", False), ("", None))


def settings_block(options: Mapping[str, Any]) -> str:
    """The options, a few lines of `name=value`."""
    listed = ", ".join(f"{name}={value}" for name, value in options.items() if name not in NOT_OF_THE_RUN)
    lines = textwrap.fill(
        without_hub_tokens(listed), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    return f"Settings that differ from the defaults:\n{lines}"


def resume_advice(args: OrdMoETrainingArguments) -> str:
    """How to go on with a run that was ended early."""
    if args.world_size > 1:
        return "To go on, start it as before, with --resume_from_checkpoint auto."
    wish = args.resume_from_checkpoint
    # Before its first checkpoint, a run that began from that of another folder has to begin there again.
    is_own = str(wish).lower() in ("none", "auto", "true", "false") or last_checkpoint(args.output_dir) is not None
    recipe = str(Path(args.output_dir, OPTIONS_NAME))
    return f"To go on: {_command('train', config=recipe, resume_from_checkpoint='auto' if is_own else wish)}"


def next_commands(model: ModelArguments, data: ScriptArguments, args: OrdMoETrainingArguments) -> list[str]:
    """The commands for the adapter of a run: evaluate it, see that it is what was saved, and export it."""
    values = vars(model)
    changed = {
        item.name: values[item.name]
        for item in fields(model)
        if item.default is not MISSING and values[item.name] != item.default
    }
    if args.trust_remote_code:
        changed["trust_remote_code"] = True
    # A split that the run did not evaluate on may not be there.
    split = data.dataset_test_split if args.eval_strategy != "no" and data.dataset_test_split != "test" else None
    # A file is one split, which was trained on.
    name = HELD_OUT if Path(data.dataset_name).is_file() else data.dataset_name
    of_data = {"dataset_name": name, "dataset_config": data.dataset_config, "dataset_split": split}
    base, adapter = model.model_name_or_path, str(Path(args.output_dir))  # without a slash at its end
    # Experts in RAM have to be asked for, and with them the recipe.
    known = () if model.offload_experts else KNOWN_TO_ADAPTERS
    of_verify = {name: value for name, value in changed.items() if name not in known}
    return [
        _command("evaluate", base, adapter=adapter, **of_data, **changed),
        _command("verify", adapter, **of_verify),
        _command("export", adapter, output_dir=f"{adapter}-peft"),
    ]


def _command(name: str, *positional: str, **options: Any) -> str:
    words = ["ordmoe", name, *positional]
    for option, value in options.items():
        if value is not None:
            words += [f"--{option}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)
