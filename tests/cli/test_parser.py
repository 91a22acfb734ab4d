"""The parser of all commands: names that stand first, short errors, and help in groups."""

from dataclasses import dataclass, field

import pytest
from trl import SFTConfig

from ordmoe_peft.cli.arguments import ModelArguments, SampleArguments
from ordmoe_peft.cli.parser import ADAPTER, CommandParser


@dataclass(kw_only=True)
class Switches:
    sure: bool | None = field(default=None, metadata={"help": "Whether."})
    shared: bool = field(default=True, metadata={"help": "Whether, too."})
    how: list[str] | None = field(default=None, metadata={"help": "How.", "choices": ["so", "else"]})
    limit: int | None = None


@dataclass(kw_only=True)
class Options(Switches, SampleArguments):
    output_dir: str = field(metadata={"help": "Folder, 100 %% ours."})


@dataclass
class AdapterOptions:
    adapter: str = field(metadata={"help": "The adapter."})
    model_name_or_path: str = field(default="", metadata={"aliases": ["--base"], "help": "The base."})


def parser(**changes) -> CommandParser:
    given = {"dataclass_types": (ModelArguments, Options), "needed": "--output_dir DIR"} | changes
    return CommandParser("try", **given)


def error_of(capsys, arguments, **changes) -> str:
    with pytest.raises(SystemExit, match="2"):
        parser(**changes).parse_args_and_config(arguments)
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ordmoe try ")
    return error.removeprefix("ordmoe try: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["base", "--output_dir", "out"],
        ["--output_dir", "out", "base"],
        ["--model_name_or_path", "base", "--output_dir=out"],
        ["--base", "base", "--output-dir", "out"],
    ],
    ids=str,
)
def test_the_model_stands_anywhere_and_under_its_names(arguments):
    model, options = parser().parse_args_and_config(arguments)
    assert (model.model_name_or_path, options.output_dir) == ("base", "out")


@pytest.mark.parametrize(
    ("arguments", "filled"),
    [
        (["a"], ("a", "")),
        (["a", "b"], ("a", "b")),
        (["a", "--base", "b"], ("a", "b")),
        (["--adapter", "a", "b"], ("a", "b")),
    ],
    ids=str,
)
def test_an_adapter_and_its_base(arguments, filled):
    (options,) = CommandParser("try", (AdapterOptions,), ADAPTER).parse_args_and_config(arguments)
    assert (options.adapter, options.model_name_or_path) == filled


@pytest.mark.parametrize("form", [["--config", "FILE"], ["--config=FILE"]], ids=str)
def test_a_file_gives_what_the_command_line_does_not(form, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("model_name_or_path: base\noutput_dir: out\nlimit: 3\nsure: true\n")
    form = [part.replace("FILE", str(file)) for part in form]
    model, options = parser().parse_args_and_config([*form, "--limit", "4"])
    assert (model.model_name_or_path, options.output_dir, options.limit, options.sure) == ("base", "out", 4, True)
    model, _ = parser().parse_args_and_config(["other", *form])
    assert model.model_name_or_path == "other"


@pytest.mark.parametrize("given", [["--sure", "--shared"], ["--sure", "true", "--no_shared"]], ids=str)
def test_truth_values_may_stand_alone(given):
    _, options = parser().parse_args_and_config(["base", "--output_dir", "out", *given])
    assert (options.sure, options.shared) == (True, given[-1] == "--shared")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "--output_dri", "out"], "unknown option --output_dri; did you mean --output_dir?"),
        (["base", "--batch-size=3"], "unknown option --batch-size; did you mean --per_device_eval_batch_size?"),
        (["base", "--limi", "3"], "unknown option --limi; did you mean --limit?"),
        (["base", "--dataset", "d"], "unknown option --dataset; did you mean --dataset_name?"),
        (["base", "--xyzzy"], "unknown option --xyzzy; `ordmoe try --help` lists all."),
        (["base"], "the following arguments are required: --output_dir"),
        (["--output_dir", "out"], "MODEL is missing: Folder or hub id of the base model."),
        (["base", "other", "--output_dir", "out"], "'other' is one argument too many"),
        (["base", "--grouping", "best"], "argument --grouping: invalid choice: 'best' (choose from 'uniform', "),
        (["base", "---dtype", "auto"], "unknown option ---dtype; did you mean --dtype?"),
        (["base", "--output_dir", "out", "--", "--limit", "4"], "'--limit' is one argument too many"),
        (["base", "--config"], "argument --config: expected one argument"),
    ],
    ids=str,
)
def test_errors_are_one_line_after_the_usage(arguments, message, capsys):
    assert error_of(capsys, arguments).startswith(message)


def test_unknown_options_in_a_file(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("limti: 3\n")
    error = error_of(capsys, ["base", "--output_dir", "out", "--config", str(file)])
    assert error == "unknown option --limti in the file of --config; did you mean --limit?"


def test_options_without_a_value_in_a_file(tmp_path, capsys):
    """What may be none takes none."""
    file = tmp_path / "options.yaml"
    file.write_text("limit: null\nper_device_eval_batch_size:\n")
    arguments = ["base", "--output_dir", "out", "--config", str(file)]
    error = error_of(capsys, arguments)
    assert error.startswith("--per_device_eval_batch_size has no value in the file of --config; give one")
    file.write_text("limit: null\n")
    assert parser().parse_args_and_config(arguments)[1].limit is None


def test_options_of_another_command_are_passed_over(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: 0.1\nlimit: 3\n")
    arguments = ["--learning-rate", "1e-4", "--label_names", "a", "b", "--bf16", "--output_dir", "out", "base"]
    model, options = parser(passed_over=(SFTConfig,)).parse_args_and_config([*arguments, "--config", str(file)])
    assert (model.model_name_or_path, options.limit) == ("base", 3)
    error = error_of(capsys, ["base", "--learning_rte", "3"], passed_over=(SFTConfig,))
    assert error.startswith("unknown option --learning_rte; `ordmoe try --help`"), "no option of this command"


def test_help_has_groups_and_one_spelling():
    text = parser(dataclass_types=(ModelArguments, Switches, SFTConfig), needed="--output_dir DIR").format_help()
    usage, *sections = text.split("\n\n")
    assert usage == "usage: ordmoe try MODEL --output_dir DIR [options]"
    titles = ["arguments", "options", "model", "data", "general"]
    titles += ["from trl.SFTConfig", "from transformers.TrainingArguments"]
    assert [section.partition(":\n")[0] for section in sections] == titles
    arguments, own, model, data, _, of_trl, of_transformers = sections
    assert "MODEL                     Folder or hub id of the base model. Also --model_name_or_path." in arguments
    assert "--output_dir TEXT" in arguments
    for expected in ("--how {so,else} [MORE ...]", "--sure [BOOL]", "--shared [BOOL]", "(default: True)"):
        assert expected in own
    assert "--dtype {auto," in model and "--limit INT" in data
    assert "--max_length INT" in of_trl and "--num_train_epochs FLOAT" in of_transformers
    two = CommandParser("try", (AdapterOptions,), ADAPTER).format_help()
    assert "ADAPTER The adapter. Also --adapter. MODEL The base. Also" in " ".join(two.split())
    assert "100 % ours" in parser().format_help()
    for hidden in ("--output-dir", "--base", "--no_shared", "(default: None)", "SUPPRESS"):
        assert hidden not in text
    assert max(map(len, text.splitlines())) <= 120, "long lists of choices are broken into lines"


@pytest.mark.parametrize(
    ("line", "filled"),
    [
        ("per-device-eval-batch-size: 4", {"per_device_eval_batch_size": 4}),
        ("how: so", {"how": ["so"]}),
        ("limit: '4'", {"limit": 4}),
        ("limit: null", {"limit": None}),
        ("dataset_config: 2020", {"dataset_config": "2020"}),
    ],
)
def test_a_recipe_gives_what_the_command_line_would(tmp_path, line, filled):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: b\noutput_dir: out\n{line}\n")
    model, options = parser().parse_args_and_config(["--config", str(file)])
    assert model.model_name_or_path == "b"
    assert {name: getattr(options, name) for name in filled} == filled


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("limit: 3.7", "argument --limit: invalid int value: 3.7 in the file of --config"),
        ("limit: true", "argument --limit: invalid int value: True in the file of --config"),
        ("num_tiers: [3]", "argument --num_tiers: invalid int value: [3] in the file of --config"),
        ("how: [so, or]", "argument --how: invalid choice: 'or' (choose from 'so', 'else') in the file of --config"),
        ("dtype: float19", "argument --dtype: invalid choice: 'float19' (choose from 'auto', 'bfloat16', 'float16', "),
        ("no_shared: true", "--no_shared can stand on the command line alone, not in the file of --config"),
        ("config: other.yaml", "--config can stand on the command line alone, not in the file of --config"),
    ],
)
def test_values_of_a_recipe_are_checked(tmp_path, capsys, line, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(line)
    assert error_of(capsys, ["base", "--output_dir", "out", "--config", str(file)]).startswith(message)
