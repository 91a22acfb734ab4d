"""What a run leaves for people: its options, where it ran, what it logged."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
import yaml

from ordmoe_peft.training.run_files import (
    ENVIRONMENT_NAME,
    METRICS_NAME,
    OPTIONS_NAME,
    MetricsFile,
    environment,
    git_state,
    without_secrets,
    write_options,
)
from tests.training.test_trainer import trainer_for


TOKEN = "hf_abcdefghijklmnopqrstuvwx"
SAVES = {"save_strategy": "steps", "save_steps": 2}


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]


class TestMetrics:
    def test_each_entry_stands_once_though_the_run_is_resumed(self, tmp_path):
        whole = trainer_for(tmp_path, **SAVES)
        whole.train()
        entries = metrics(tmp_path)
        assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 4]
        assert entries == whole.state.log_history
        with (tmp_path / METRICS_NAME).open("a") as file:
            file.write('{"step": 5, "los')  # as a process leaves it that is killed while it writes
        trainer_for(tmp_path, **SAVES).train(str(tmp_path / "checkpoint-2"))
        again = metrics(tmp_path)
        for entry in (*entries, *again):
            entry.pop("num_tokens", None)  # TRL counts from 0 again
        assert again[:4] == entries[:4]
        assert len(again) == 5 and "train_runtime" in again[4]

    def test_an_evaluation_without_training_writes_nothing(self, tmp_path):
        trainer_for(tmp_path).log({"eval_loss": 1.0})
        assert not (tmp_path / METRICS_NAME).exists()

    def test_numbers_that_json_does_not_have(self, tmp_path):
        file = MetricsFile(tmp_path)
        file.is_kept = True
        state = SimpleNamespace(is_world_process_zero=True, log_history=[{"loss": float("nan"), "step": 1}])
        file.on_train_begin(None, state, None)
        state.log_history.append({"loss": float("inf"), "epoch": 0.5, "step": 2})
        file.on_log(None, state, None)
        text = (tmp_path / METRICS_NAME).read_text()
        assert text == '{"step": 1, "loss": null}\n{"step": 2, "epoch": 0.5, "loss": null}\n'

    def test_other_processes_write_nothing(self, tmp_path):
        file = MetricsFile(tmp_path)
        file.is_kept = True
        file.on_train_begin(None, SimpleNamespace(is_world_process_zero=False, log_history=[]), None)
        file.on_log(None, SimpleNamespace(log_history=[{}]), None)
        assert not list(tmp_path.iterdir())


class TestOptions:
    def test_what_is_of_one_start_and_what_is_secret_stay_out(self, tmp_path):
        options = {"lora_r": 4, "hub_token": TOKEN, "overwrite_output_dir": True, "pad_token": "<pad>"}
        secrets = {"model_init_kwargs": f'{{"token": "{TOKEN}"}}', "generation_kwargs": {"token": TOKEN}}
        write_options(tmp_path, options | secrets)
        assert yaml.safe_load((tmp_path / OPTIONS_NAME).read_text()) == {
            **{"lora_r": 4, "pad_token": "<pad>"},
            **{"model_init_kwargs": '{"token": "<hidden>"}', "generation_kwargs": {"token": "<hidden>"}},
        }

    def test_folders_that_begin_as_tokens_do_stay(self, tmp_path):
        options = {"dataset_name": "/data/hf_datasets/train.jsonl", "output_dir": "out/hf_checkpoints_of_may"}
        write_options(tmp_path, options | {"run_name": f"hf_oauth_{'a' * 30}.b_c-d"})
        assert yaml.safe_load((tmp_path / OPTIONS_NAME).read_text()) == options | {"run_name": "<hidden>"}

    def test_a_new_run_from_python_removes_those_of_an_earlier_one(self, tmp_path):
        (tmp_path / OPTIONS_NAME).write_text("lora_r: 8\n")
        trainer_for(tmp_path, **SAVES).train()
        assert not (tmp_path / OPTIONS_NAME).exists()
        assert json.loads((tmp_path / ENVIRONMENT_NAME).read_text())["data"]["rows"] == 8
        longer = trainer_for(tmp_path, **SAVES | {"max_steps": 5})
        longer.run_options = {"lora_r": 4}
        longer.train("auto")
        assert (tmp_path / OPTIONS_NAME).read_text() == "lora_r: 4\n"


class TestEnvironment:
    def test_it_says_where(self):
        found = json.loads(json.dumps(environment({"digest": "d"}, 3, command=["/bin/ordmoe", "train"])))
        assert found["packages"]["torch"] == torch.__version__
        assert found["processes"] == 3 and found["command"] == ["ordmoe", "train"]
        assert found["cpu"]["name"] and found["cpu"]["cores"] and found["cpu"]["memory_bytes"] > 2**28
        assert len(found["gpus"]) == torch.cuda.device_count()
        assert found["data"] == {"digest": "d", "git": None}

    @pytest.mark.parametrize(
        ("words", "shown"),
        [
            (["--hub_token", "abc", "--seed", "1"], ["--hub_token", "***", "--seed", "1"]),
            (["--hub_token=abc"], ["--hub_token=***"]),
            (["--pad_token", "<pad>", "--eos_token=<eos>"], ["--pad_token", "<pad>", "--eos_token=<eos>"]),
            (
                ["--model_init_kwargs", '{"token": "hf_abcdefghijklmnopqrstuvwx"}'],
                ["--model_init_kwargs", '{"token": "***"}'],
            ),
        ],
    )
    def test_secrets_of_the_command_line(self, words, shown):
        assert without_secrets(["ordmoe", *words]) == ["ordmoe", *shown]

    def test_git(self, tmp_path, monkeypatch):
        def git(*arguments):
            named = ["-c", "user.name=n", "-c", "user.email=e"]
            return subprocess.run(
                ["git", "-C", tmp_path, *named, *arguments], check=True, capture_output=True, text=True
            )

        data = tmp_path / "data"
        data.mkdir()
        (data / "train.jsonl").write_text("{}")
        assert git_state(data) is None
        git("init", "-q")
        assert git_state(data) is None  # not tracked
        git("add", ".")
        git("commit", "-qm", "data")
        revision = git("rev-parse", "HEAD").stdout.strip()
        assert git_state(data) == {"revision": revision, "dirty": False}
        (tmp_path / "other").write_text("beside the data")
        assert git_state(data / "train.jsonl") == {"revision": revision, "dirty": False}
        (data / "train.jsonl").write_text("{} ")
        assert environment({}, 1, str(data))["data"]["git"] == {"revision": revision, "dirty": True}
        assert git_state(data / "train.jsonl") == {"revision": revision, "dirty": True}
        monkeypatch.setenv("PATH", "")
        assert git_state(data) is None
