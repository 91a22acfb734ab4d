# ruff: noqa: F811 (fixtures)
"""The options of a run, and the commands that its end prints."""

import shlex

import pytest
import yaml
from trl import ScriptArguments

from ordmoe import main
from ordmoe_peft import OrdMoETrainingArguments
from ordmoe_peft.cli.arguments import ModelArguments
from ordmoe_peft.cli.run_options import given_options, next_commands, resume_advice, settings_block
from ordmoe_peft.cli.train import OPTIONS, build_parser
from ordmoe_peft.training.run_files import OPTIONS_NAME
from tests.test_ordmoe import base, data, train_arguments  # noqa: F401 (fixtures)
from tests.training.test_run_files import metrics


def given(words: list[str]) -> dict:
    parser = build_parser()
    parser.parse_args_and_config(words)
    return given_options(parser, words, OPTIONS)


def test_what_is_at_its_default_is_left_out(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("targets: [router]\nlora_r: 16\nlearning_rate: 1.0e-3\nbf16: false\neval_strategy: 'no'\n")
    words = ["--config", str(recipe), "--model_name_or_path", "B", "--dataset_name", "D", "--output_dir", "out"]
    assert given([*words, "--seed", "3", "--learning_rate", "2e-3", "--erl_coef", "0.01"]) == {
        **{"model_name_or_path": "B", "targets": ["router"], "dataset_name": "D", "output_dir": "out"},
        **{"learning_rate": 2e-3, "bf16": False, "seed": 3},
    }


def test_the_block_that_is_printed():
    block = settings_block({"lora_r": 4, "hub_token": "hf_secret", "dataset_name": "a b"})
    assert block == "Settings that differ from the defaults:\n  lora_r=4, dataset_name=a b"
    assert "hf_" not in settings_block({"model_init_kwargs": '{"token": "hf_abcdefghijklmnopqrstuvwx"}'})


def test_a_run_is_run_again_from_its_file(base, data, tmp_path, capsys):
    """With the same options, and to the same losses."""
    changes = {"lr_scheduler_kwargs": '{"num_cycles": 2}', "lr_scheduler_type": "cosine", "rewards": None}
    changes = {name: value for name, value in changes.items() if value is not None}
    words = train_arguments(base, data, tmp_path / "one", seed=5, logging_steps=1, save_strategy="no", **changes)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Settings that differ from the defaults:\n  model_name_or_path=" in printed
    commands = [shlex.split(line) for line in printed.partition("Next:\n")[2].splitlines()]
    assert [command[1] for command in commands] == ["evaluate", "verify", "export"]
    assert commands[0][commands[0].index("--dataset_name") + 1] == str(data)
    assert [main(command[1:]) for command in commands] == [0, 0, 0]
    recipe = tmp_path / "one" / OPTIONS_NAME
    options = yaml.safe_load(recipe.read_text())
    assert options["seed"] == 5 and options["bf16"] is False and options["output_dir"] == str(tmp_path / "one")
    again = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "two")]
    assert main(again) == 0
    assert yaml.safe_load((tmp_path / "two" / OPTIONS_NAME).read_text()) == options | {
        "output_dir": str(tmp_path / "two")
    }
    one, two = (
        [[entry.get(name) for name in ("step", "loss", "grad_norm", "learning_rate")] for entry in metrics(folder)]
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 3


def train_args(folder, **changes) -> OrdMoETrainingArguments:
    return OrdMoETrainingArguments(str(folder), report_to="none", bf16=False, **changes)


@pytest.mark.parametrize(
    ("model", "data", "evaluate", "verify"),
    [
        ({}, {}, "ordmoe evaluate 'my base' --adapter out --dataset_name D", "ordmoe verify out"),
        (
            {"load_in_4bit": True, "dtype": "float32", "model_revision": "v1"},
            {"dataset_config": "en"},
            "ordmoe evaluate 'my base' --adapter out --dataset_name D --dataset_config en --model_revision v1 "
            "--dtype float32 --load_in_4bit true",
            "ordmoe verify out --model_revision v1",
        ),
    ],
)
def test_what_comes_next(model, data, evaluate, verify):
    model_options = ModelArguments("my base", **model)
    commands = next_commands(model_options, ScriptArguments(dataset_name="D", **data), train_args("out"))
    assert commands == [evaluate, verify, "ordmoe export out --output_dir out-peft"]


@pytest.mark.parametrize(("strategy", "end"), [("steps", " --dataset_split dev"), ("no", "")])
def test_the_split_that_the_run_evaluated_on_is_evaluated(strategy, end):
    args = train_args("out", eval_strategy=strategy, eval_steps=1)
    evaluate, *_ = next_commands(ModelArguments("B"), ScriptArguments("D", dataset_test_split="dev"), args)
    assert evaluate == f"ordmoe evaluate B --adapter out --dataset_name D{end}"


def test_a_file_is_not_evaluated_on_that_was_trained_on(tmp_path):
    (tmp_path / "train.jsonl").touch()
    evaluate, *_ = next_commands(ModelArguments("B"), ScriptArguments(str(tmp_path / "train.jsonl")), train_args("out"))
    assert evaluate == "ordmoe evaluate B --adapter out --dataset_name HELD_OUT_DATA"


def test_a_slash_at_the_end_does_not_export_into_the_adapter():
    *_, export = next_commands(ModelArguments("B"), ScriptArguments(dataset_name="D"), train_args("out/"))
    assert export == "ordmoe export out --output_dir out-peft"


def test_how_to_go_on_from_a_checkpoint_of_another_folder(tmp_path):
    """`auto` would begin from the start where nothing is saved yet."""
    checkpoint = tmp_path / "my other" / "checkpoint-2"
    advice = resume_advice(train_args(tmp_path / "out", resume_from_checkpoint=str(checkpoint)))
    assert shlex.split(advice)[-2:] == ["--resume_from_checkpoint", str(checkpoint)]


def test_how_to_go_on(tmp_path):
    advice = resume_advice(train_args(tmp_path / "my run"))
    command = advice.removeprefix("To go on: ")
    assert shlex.split(command) == [
        *("ordmoe", "train", "--config", str(tmp_path / "my run" / OPTIONS_NAME)),
        *("--resume_from_checkpoint", "auto"),
    ]
