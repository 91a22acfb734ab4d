"""The `ordmoe` command as a user types it: what it does, and one line for what goes wrong."""

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset

import ordmoe
import ordmoe_peft
from ordmoe import COMMANDS, main, parser_for_completion, shipped_help
from ordmoe_peft.cli.parser import CommandParser
from ordmoe_peft.errors import OrdMoEError
from ordmoe_peft.training.run_summary import peak_memory
from tests import models, text
from tests.help_texts import help_text


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny text model with its tokenizer, in a folder."""
    return save_base(models.qwen3_moe(), tmp_path / "base")


def save_base(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    text.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """A data set in a folder, with a train and a test split."""
    return save_data(text.conversations(), tmp_path / "data")


def save_data(dataset, folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "test"):
        dataset.to_parquet(folder / f"{split}.parquet")
    return folder


def train_arguments(base, data, output, **changes) -> list[str]:
    options = {
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "lora_r": 4,
        **changes,
    }
    return ["train", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def error_of(capsys, arguments) -> str:
    try:
        status = main(arguments)
    except SystemExit as end:  # of the parser
        status = end.code
    assert status == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_train_from_a_recipe_and_evaluate(base, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("load_in_4bit: true\nuse_bnb_nested_quant: true\ntargets: [router, experts, attention]\n")
    adapter = tmp_path / "adapter"
    torch.ones(2**27)  # 512 MiB, held and freed before training
    peak = peak_memory()
    evaluating = train_arguments(base, data, adapter, eval_strategy="steps", eval_steps=1)
    assert main([*evaluating, "--config", str(recipe)]) == 0
    output = capsys.readouterr().out
    assert "gate_up" in output
    assert str(adapter) in output
    assert (adapter / "adapter_model.safetensors").is_file()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "ORDMOE"
    assert config["targets"] == ["router", "experts", "attention"]
    metrics = json.loads((adapter / "train_results.json").read_text())
    assert metrics["train_steps"] == 2
    assert metrics["peak_memory_bytes"] >= peak
    history = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    assert any("eval_tier_3/log_likelihood" in entry for entry in history)
    card = (adapter / "README.md").read_text()
    assert "# OrdMoE adapter of `base`" in card
    assert "| data | name `data`, split `train`, rows 8," in card
    assert "## Results" in card
    assert "None" not in card
    assert str(tmp_path) not in card + (adapter / "ordmoe.json").read_text()

    results = tmp_path / "results.json"
    arguments = ["evaluate", "--model_name_or_path", base, "--adapter", adapter, "--dataset_name", data]
    arguments += ["--tiers", 1, 3, "--group_by", "kind", "--max_new_tokens", 3, "--limit", 6, "--output_file", results]
    assert main(list(map(str, arguments))) == 0
    top, bottom = json.loads(results.read_text())
    assert (top["tier"], bottom["tier"]) == (1, 3)
    assert top["samples"]["overall"] == 6 == top["samples"]["even"] + top["samples"]["odd"]
    assert top["log_likelihood"] != bottom["log_likelihood"]
    assert "log-likelihood" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shipped_help_is_what_the_parser_prints(command, capsys, monkeypatch):
    shipped = (ordmoe.HELP_TEXTS / f"{command}.txt").read_text(encoding="utf-8").partition("\n")[2]
    if shipped_help(command) is not None:
        assert main([command, "--limit", "--help"]) == 0
        assert capsys.readouterr().out == shipped == help_text(command), "run `python -m tests.help_texts`"
    monkeypatch.setattr("ordmoe.metadata.version", lambda name: "0.0")
    with pytest.raises(SystemExit, match="0"):
        main([command, "-h"])
    assert capsys.readouterr().out == help_text(command)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ordmoe ev", {"evaluate"}),
        ("ordmoe --traceback me", {"merge"}),
        ("ordmoe evaluate --dataset_s", {"--dataset_split"}),
        ("ordmoe evaluate base --dtype b", {"bfloat16"}),
        ("ordmoe train --targets router sh", {"shared_experts"}),
        ("ordmoe train base --bf16 f", {"false"}),
    ],
    ids=str,
)
def test_the_shell_completes_commands_and_options(line, expected):
    """Asked as argcomplete's shell function asks; the answer is what descriptor 8 gets."""
    pytest.importorskip("argcomplete", reason="the extra `completion`")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    command = ["bash", "-c", '"$0" -m ordmoe 8>&1 9>/dev/null >/dev/null', sys.executable]
    result = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert {word.strip() for word in result.stdout.split("\n")} == expected, result.stderr


def test_under_other_versions_the_parser_itself_completes(monkeypatch):
    monkeypatch.setattr("ordmoe.shipped_help", lambda command: None)
    assert isinstance(parser_for_completion("verify"), CommandParser)


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_help_names_every_command_and_imports_none(arguments):
    code = f"import sys; sys.argv = ['ordmoe', *{arguments}]; import ordmoe\n"
    code += "try: ordmoe.main()\nfinally: print({name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    printed, _, imported = result.stdout.strip().rpartition("\n")
    assert all(f"\n  {command} " in printed for command in COMMANDS)
    assert eval(imported) & {"torch", "transformers", "trl", "numpy", "yaml", "ordmoe_peft"} == set()


def test_version(capsys, monkeypatch):
    assert main(["--version"]) == 0
    installed = capsys.readouterr().out
    monkeypatch.setattr("ordmoe.metadata.version", Mock(side_effect=metadata.PackageNotFoundError))
    assert main(["--version"]) == 0
    assert installed == capsys.readouterr().out == f"ordmoe {ordmoe_peft.__version__}\n"


@pytest.mark.parametrize(
    ("command", "message"), [("evalute", "did you mean evaluate?"), ("fly", "there are families,")]
)
def test_commands_that_there_are_not(command, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--traceback"])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"ordmoe: error: unknown command '{command}'; {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "routers"}, "argument --targets: invalid choice: 'routers' (choose from "),
        ({"rewards": "0"}, "rewards needs one value for each of the 3 tiers"),
        ({"num_tiers": 5}, "--num_tiers 5 does not fit"),
        ({"targets": "shared_experts"}, "has nothing of that role"),
        ({"bnb_4bit_compute_dtype": "int3", "load_in_4bit": True}, "invalid choice: 'int3'"),
        ({"dataset_name": "/no/such/folder"}, "/no/such/folder"),
        ({"model_name_or_path": "/no/such/model"}, "/no/such/model"),
        ({"dataset_train_split": "nosuch"}, "nosuch"),
        ({"config": "/no/such/recipe.yaml"}, "/no/such/recipe.yaml"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_users_get_wrong_is_one_line(base, data, tmp_path, capsys, changes, message):
    error = error_of(capsys, train_arguments(base, data, tmp_path / "out", **changes))
    assert error.splitlines()[-1].startswith("ordmoe train: error: ") or message in error
    assert message in error
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_model_folder_without_a_tokenizer(data, tmp_path, capsys):
    """transformers makes an empty tokenizer of its class's kind, or none."""
    for build in (models.qwen3_moe, models.mixtral, models.qwen3_vl_moe):
        folder = tmp_path / build.__name__
        build().save_pretrained(folder)
        assert str(folder) in (error := error_of(capsys, train_arguments(folder, data, tmp_path / "out")))
        assert "tokenizer" in error
        evaluate = ["evaluate", "--model_name_or_path", str(folder), "--dataset_name", str(data)]
        assert "tokenizer" in error_of(capsys, evaluate)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("answers", "message"), [([""] * 8, "empty in all 8 rows"), (["w5"] * 7 + [None], "row 7 (counted from 0)")]
)
def test_answers_that_are_missing(base, tmp_path, capsys, answers, message):
    rows = [{"prompt": "w20", "completion": answer} for answer in answers]
    data = save_data(Dataset.from_list(rows), tmp_path / "data")
    assert message in error_of(capsys, train_arguments("/no/such/model", data, tmp_path / "out"))
    shared = ["--model_name_or_path", str(base), "--dataset_name", str(data)]
    for command in ("evaluate", "tiers"):
        assert message in error_of(capsys, [command, *shared])
    without_prompts = save_data(Dataset.from_list(rows).rename_columns(PROMPTS_TO_ANSWERS), tmp_path / "no prompts")
    if None in answers:
        shared[-1] = str(without_prompts)
        assert message in error_of(capsys, ["rollouts", *shared, "--output_dir", str(tmp_path / "rollouts")])
        assert message in error_of(capsys, ["inspect", *shared])
    assert not (tmp_path / "out").exists() and not (tmp_path / "rollouts").exists()


PROMPTS_TO_ANSWERS = {"prompt": "completion", "completion": "prompt"}


def test_samples_that_are_longer_than_the_models_positions(data, tmp_path, capsys):
    short = save_base(models.qwen3_moe(max_position_embeddings=4), tmp_path / "short")
    shared = ["--model_name_or_path", str(short), "--dataset_name", str(data)]
    rollouts = ["rollouts", *shared, "--output_dir", str(tmp_path / "rollouts")]
    train = train_arguments(short, data, tmp_path / "out")
    for command in (train, ["evaluate", *shared], ["tiers", *shared], ["inspect", *shared], rollouts):
        assert "the model has 4 positions (max_position_embeddings)" in error_of(capsys, command)


def test_a_model_without_moe_layers(data, tmp_path, capsys):
    dense = save_base(models.qwen3_dense(), tmp_path / "dense")
    error = error_of(capsys, train_arguments(dense, data, tmp_path / "out"))
    assert "Qwen3ForCausalLM has no MoE layers" in error


def test_a_data_set_without_answers(base, tmp_path, capsys):
    data = save_data(text.conversations().remove_columns("completion"), tmp_path / "questions")
    assert "none of which holds an answer" in error_of(capsys, train_arguments(base, data, tmp_path / "out"))
    evaluate = ["evaluate", "--model_name_or_path", str(base), "--dataset_name", str(data)]
    assert "no column 'completion'" in error_of(capsys, evaluate)


def test_evaluating_what_is_not_there(base, data, tmp_path, capsys):
    evaluate = ["evaluate", "--model_name_or_path", str(base), "--dataset_name", str(data)]
    assert "--group_by color is not a column" in error_of(capsys, [*evaluate, "--group_by", "color"])
    assert "No data set" in error_of(capsys, evaluate[:3])
    assert "/no/such/adapter" in error_of(capsys, [*evaluate, "--adapter", "/no/such/adapter"])


def test_an_adapter_of_another_base(base, data, tmp_path, capsys):
    assert main(train_arguments(base, data, tmp_path / "adapter")) == 0
    wider = save_base(models.qwen3_moe(hidden_size=128), tmp_path / "wider")
    arguments = ["evaluate", "--model_name_or_path", wider, "--dataset_name", data, "--adapter", tmp_path / "adapter"]
    assert "made for another base" in error_of(capsys, list(map(str, arguments)))


def test_traceback_on_request(base, capsys):
    assert main(["--traceback", "evaluate", "--model_name_or_path", str(base)]) == 2
    assert "Traceback" in capsys.readouterr().err


def with_command(monkeypatch, act) -> int:
    """The exit code of a command that does nothing but `act`."""
    monkeypatch.setitem(sys.modules, "ordmoe_peft.cli.plan", SimpleNamespace(main=lambda arguments: act()))
    return main(["plan"])


def raising(error):
    def act():
        raise error

    return act


def test_ctrl_c_and_sigterm_end_as_shells_have_it(monkeypatch, capsys):
    assert with_command(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end:
            with_command(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
        assert end.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nobody_reads_what_is_printed(monkeypatch, capfd, tmp_path):
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=raising(BrokenPipeError()), fileno=out.fileno))
        assert with_command(monkeypatch, lambda: None) == 141
    assert capfd.readouterr().err == ""


def test_a_bug_keeps_its_traceback_and_asks_to_be_reported(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        with_command(monkeypatch, lambda: 1 / 0)
    assert "Please report it" in capsys.readouterr().err


def test_an_error_may_have_an_exit_code_of_its_own(monkeypatch, capsys):
    error = OrdMoEError("Stopped.")
    error.status = 143
    assert with_command(monkeypatch, raising(error)) == 143
    assert capsys.readouterr().err == "ordmoe plan: error: Stopped.\n"
