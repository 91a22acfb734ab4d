"""`ordmoe rollouts` as a user types it, killed and all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset

from ordmoe import main
from ordmoe_peft.cli import rollouts as command
from tests import models, text
from tests.test_ordmoe import error_of


SHARDS = 16


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    models.qwen3_moe().save_pretrained(folder)
    text.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    text.conversations(SHARDS).to_parquet(folder / "train.parquet")
    return folder


def arguments(base, data, output, **changes) -> list[str]:
    options = {
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": output,
        "max_completion_length": 5,
        "per_device_eval_batch_size": 4,
        **changes,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return ["rollouts", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def test_a_killed_run_goes_on_to_the_same_rows(base, data, tmp_path):
    options = {"samples_per_shard": 1, "per_device_eval_batch_size": 1, "max_completion_length": 16}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "ordmoe", *arguments(base, data, killed, **options)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    first = killed / f"data/train-00000-of-{SHARDS:05d}.parquet"
    while not first.exists():
        assert process.poll() is None, "the run ended without a shard"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    shards = {path: path.stat().st_mtime_ns for path in killed.glob("data/train-*.parquet")}
    assert 1 <= len(shards) < SHARDS

    assert main(arguments(base, data, killed, **options)) == 0
    assert main(arguments(base, data, whole, **options)) == 0
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    rows = load_dataset(str(killed), split="train")
    assert len(rows) == SHARDS
    assert rows[:] == load_dataset(str(whole), split="train")[:]


def test_rollouts_and_pairs_are_data_sets(base, data, tmp_path, capsys):
    output = tmp_path / "out"
    run = arguments(base, data, output, limit=6, keep_columns="kind", temperature=0, preference_pairs="true")
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert "same as tier 1" in printed
    assert f"6 rollouts in {output}" in printed
    rows = load_dataset(str(output), split="train")
    assert len(rows) == 6
    assert {"prompt", "completion", "kind", "responses", "gate_mass"} <= set(rows.column_names)
    pairs = load_dataset(str(output / "preference_pairs"), split="train")
    assert f"{len(pairs)} preference pairs" in printed
    different = [row["responses"] for row in rows if row["responses"][0] != row["responses"][2]]
    assert [row["chosen"][0]["content"] for row in pairs] == [texts[0] for texts in different]
    assert [row["rejected"][0]["content"] for row in pairs] == [texts[2] for texts in different]
    settings = json.loads((output / "rollout_settings.json").read_text())
    assert (settings["sources"]["limit"], settings["sources"]["split"]) == (6, "train")
    assert "rows_per_call" in settings, "the name that folders of earlier versions have"
    assert settings["generation"]["do_sample"] is False

    # The pairs in the folder are no rows of the rollouts, and no obstacle to going on.
    assert main(run) == 0
    assert len(load_dataset(str(output), split="train")) == 6


def test_rollouts_are_pushed_with_their_settings(base, data, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("datasets.Dataset.push_to_hub", lambda self, repo: sent.append((repo, len(self))))
    monkeypatch.setattr(command.HfApi, "upload_file", lambda self, **options: sent.append(options))
    assert main(arguments(base, data, tmp_path / "out", limit=2, push_to_hub=True, repo_id="me/rollouts")) == 0
    assert sent[0] == ("me/rollouts", 2)
    assert sent[1]["path_or_fileobj"] == tmp_path / "out/rollout_settings.json"
    assert (sent[1]["repo_id"], sent[1]["repo_type"]) == ("me/rollouts", "dataset")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "No data set"),
        ({"dataset_name": "/no/such/folder"}, "/no/such/folder"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"tiers": 4}, "from 1 (the top) to --num_tiers 3"),
        ({"dataset_split": "nosuch"}, "nosuch"),
        ({"push_to_hub": True}, "--push_to_hub true needs a data set repository"),
        ({"adapter": "/no/such/adapter"}, "/no/such/adapter"),
        ({"temperature": -1}, "temperature"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_users_get_wrong_is_one_line(base, data, tmp_path, capsys, changes, message):
    error = error_of(capsys, arguments(base, data, tmp_path / "out", **changes))
    assert message in error
    assert not list(tmp_path.glob("out/data/*"))


def test_data_without_prompts(base, tmp_path, capsys):
    folder = tmp_path / "answers"
    folder.mkdir()
    text.conversations(2).remove_columns("prompt").to_parquet(folder / "train.parquet")
    assert "no column 'prompt'" in error_of(capsys, arguments(base, folder, tmp_path / "out"))


def test_other_settings_in_the_same_folder(base, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(arguments(base, data, output, limit=4)) == 0
    before = {path: path.read_bytes() for path in output.rglob("*.*") if path.is_file()}
    assert "seed (42 there, 3 now)" in error_of(capsys, arguments(base, data, output, limit=4, seed=3))
    assert {path: path.read_bytes() for path in output.rglob("*.*") if path.is_file()} == before
