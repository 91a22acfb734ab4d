"""The `ordmoe` command as a user types it: what it does, and one line for what goes wrong."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file

from ordmoe_peft.cli.main import COMMANDS, main
from ordmoe_peft.cli.tables import peak_memory
from ordmoe_peft.training.run_record import RECORD_NAME, RunFolder
from tests import models, text


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
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_train_evaluate_and_export_from_a_recipe(base, data, tmp_path, capsys):
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

    results = tmp_path / "results.json"
    arguments = ["evaluate", "--model_name_or_path", base, "--adapter", adapter, "--dataset_name", data]
    arguments += ["--tiers", 1, 3, "--group_by", "kind", "--max_new_tokens", 3, "--limit", 6, "--output", results]
    assert main(list(map(str, arguments))) == 0
    top, bottom = json.loads(results.read_text())
    assert (top["tier"], bottom["tier"]) == (1, 3)
    assert top["samples"]["overall"] == 6 == top["samples"]["even"] + top["samples"]["odd"]
    assert top["log_likelihood"] != bottom["log_likelihood"]
    assert "log-likelihood" in capsys.readouterr().out

    assert main(["export", str(adapter), "--output", str(tmp_path / "plain")]) == 0
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "plain")
    assert loaded.peft_config["default"].peft_type == "LORA"


def test_the_seed_decides_the_adapter(base, data, tmp_path):
    """Its first factors, too, whatever state the process was in."""
    states = []
    for run, seed in enumerate((7, 7, 8)):
        torch.manual_seed(100 + run)
        assert main(train_arguments(base, data, tmp_path / str(run), seed=seed)) == 0
        states.append(load_file(tmp_path / str(run) / "adapter_model.safetensors"))
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first[min(first)], other[min(first)])


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_names_every_command_and_each_has_its_own(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"] if command is None else [command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for expected in COMMANDS if command is None else [f"ordmoe {command}"]:
        assert expected in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "routers"}, "targets must be one or more of"),
        ({"rewards": "0"}, "rewards needs one value for each of the 3 tiers"),
        ({"num_tiers": 5}, "num_tiers=5 does not fit"),
        ({"targets": "shared_experts"}, "has nothing of that role"),
        ({"bnb_4bit_compute_dtype": "int3", "load_in_4bit": True}, "got 'int3'"),
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
    ("answers", "message"), [([""] * 8, "empty in all 8 rows"), (["w5"] * 7 + [None], "Row 7 (counted from 0)")]
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
        assert message in error_of(capsys, ["rollouts", *shared, "--output", str(tmp_path / "rollouts")])
        assert message in error_of(capsys, ["inspect", *shared])
    assert not (tmp_path / "out").exists() and not (tmp_path / "rollouts").exists()


PROMPTS_TO_ANSWERS = {"prompt": "completion", "completion": "prompt"}


def test_samples_that_are_longer_than_the_models_positions(data, tmp_path, capsys):
    short = save_base(models.qwen3_moe(max_position_embeddings=4), tmp_path / "short")
    shared = ["--model_name_or_path", str(short), "--dataset_name", str(data)]
    rollouts = ["rollouts", *shared, "--output", str(tmp_path / "rollouts")]
    train = train_arguments(short, data, tmp_path / "out")
    for command in (train, ["evaluate", *shared], ["tiers", *shared], ["inspect", *shared], rollouts):
        assert "the model has 4 positions (max_position_embeddings)" in error_of(capsys, command)


class TestRuns:
    """A run that ends in nothing says so; one that is there is gone on with, or left alone."""

    def test_weights_that_are_not_finite(self, data, tmp_path, capsys):
        model = models.qwen3_moe()
        model.model.norm.weight.data[:] = torch.nan
        folder = save_base(model, tmp_path / "broken")
        out = tmp_path / "out"
        error = error_of(capsys, train_arguments(folder, data, out, save_strategy="steps", save_steps=1))
        assert "2 of 2 steps did not move the weights: 2 with a loss or gradient that was not finite" in error
        assert not RunFolder(out).results

    def test_a_learning_rate_that_wrecks_the_adapter(self, base, data, tmp_path, capsys):
        changes = {"learning_rate": 1e30, "max_steps": 6, "lr_scheduler_type": "constant"}
        assert "of 6 steps did not move the weights" in error_of(
            capsys, train_arguments(base, data, tmp_path / "out", **changes)
        )
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()

    @pytest.mark.parametrize("saves", ["steps", "no"])
    def test_a_finished_run_is_left_alone(self, base, data, tmp_path, capsys, saves):
        out = tmp_path / "out"
        again = train_arguments(base, data, out, save_strategy=saves, resume_from_checkpoint="auto")
        assert main(again) == 0
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(again) == 0
        assert f"The run in {out} is already finished." in capsys.readouterr().out
        assert "learning_rate" in error_of(capsys, [*again, "--learning_rate", "0.3"])
        assert "has results of an earlier run" in error_of(capsys, train_arguments(base, data, out))
        after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
        assert after == before
        assert main(train_arguments(base, data, out, overwrite_output_dir=True, learning_rate=0.3)) == 0
        assert json.loads((out / RECORD_NAME).read_text())["settings"]["learning_rate"] == 0.3

    def test_a_run_killed_before_it_saved_its_adapter_is_ended(self, base, data, tmp_path, capsys):
        out = tmp_path / "out"
        again = train_arguments(base, data, out, save_strategy="steps", resume_from_checkpoint="auto")
        assert main(again) == 0
        adapter = (out / "adapter_model.safetensors").read_bytes()
        record = json.loads((out / RECORD_NAME).read_text())
        del record["finished"]
        (out / RECORD_NAME).write_text(json.dumps(record))
        (out / "adapter_model.safetensors").unlink()
        assert main(again) == 0
        assert "already finished" not in capsys.readouterr().out
        assert (out / "adapter_model.safetensors").read_bytes() == adapter
        assert "train_loss" not in json.loads((out / "train_results.json").read_text())  # no step was taken

    def test_a_finished_run_may_be_made_longer(self, base, data, tmp_path):
        again = train_arguments(base, data, tmp_path, save_strategy="steps", resume_from_checkpoint="auto")
        assert main(again) == 0
        assert main([*again, "--max_steps", "3"]) == 0
        assert json.loads((tmp_path / "train_results.json").read_text())["train_steps"] == 3


def test_rewards_that_rise(base, data, tmp_path, capsys):
    arguments = [*train_arguments(base, data, tmp_path / "out"), "--rewards", "0", "0.5", "1"]
    assert "rewards must be finite and not rise" in error_of(capsys, arguments)


def test_unknown_options_in_a_recipe(base, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_teirs: 3\n")
    error = error_of(capsys, [*train_arguments(base, data, tmp_path / "out"), "--config", str(recipe)])
    assert "num_teirs" in error


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
    assert "group_by='color' is not a column" in error_of(capsys, [*evaluate, "--group_by", "color"])
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
