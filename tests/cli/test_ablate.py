"""`ordmoe ablate` as a user types it, on a tiny text model."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from ordmoe import main
from ordmoe_peft.tools.ablate import runner
from ordmoe_peft.tools.ablate.run import train_run
from tests import models, text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options that name a tiny base and its data."""
    folder = tmp_path_factory.mktemp("inputs")
    base, data = folder / "base", folder / "data"
    models.qwen3_moe().save_pretrained(base)
    text.tokenizer().save_pretrained(base)
    data.mkdir()
    for split, count in (("train", 8), ("validation", 5), ("test", 7)):
        text.conversations(count).to_parquet(data / f"{split}.parquet")
    return {"model_name_or_path": str(base), "dataset_name": str(data)}


def recipe(folder, inputs, **changes):
    options = {
        **inputs,
        "output_dir": str(folder / "out"),
        "train_limit": 4,
        "test_limit": 6,
        "max_new_tokens": 3,
        "seeds": [0, 1],
        "tune_seeds": [5],
        "tune": {"erl_coef": ["1e-2", 0.1]},
        "cells": [{"name": "OrdMoE", "grouping": "high_only"}],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "use_cpu": True,
        "lora_r": 4,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(options))
    return ["ablate", "--config", str(path)]


def results(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def without_times(results):
    cells = [{name: value for name, value in cell.items() if name != "seconds_per_step"} for cell in results["cells"]]
    return {**results, "cells": cells}


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "runs").glob("*.json")}


@pytest.mark.slow
def test_a_killed_ablation_goes_on_and_gives_the_results_of_a_whole_one(inputs, tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "ordmoe", *recipe(killed, inputs)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(files(killed)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = files(killed)
    assert 3 <= len(before) < 8
    assert not (killed / "out" / "results.json").exists()

    assert main(recipe(killed, inputs)) == 0
    after = files(killed)
    assert len(after) == 8
    assert before.items() <= after.items(), "a finished run was run again"
    capsys.readouterr()

    assert main(recipe(whole, inputs)) == 0
    assert without_times(results(whole)) == without_times(results(killed))
    assert files(whole).keys() == after.keys()

    base, sft, ordmoe = results(whole)["cells"]
    assert (base["name"], sft["name"], ordmoe["name"]) == ("base", "SFT (C = 1)", "OrdMoE")
    assert ordmoe["chosen"]["erl_coef"] in (0.01, 0.1)
    assert ordmoe["difference"].keys() == {"mean", "low", "high", "is_gain", "verdict"}
    assert len(sft["tier_log_likelihood"]) == 3
    assert sft["log_likelihood"]["mean"] != ordmoe["log_likelihood"]["mean"]
    for path in (whole / "out" / "runs").glob("*.json"):
        evaluation = json.loads(path.read_text())["evaluation"]
        tunes = path.name.startswith("tune_")
        assert (evaluation["split"], len(evaluation["is_right"])) == (("validation", 5) if tunes else ("test", 6))
    table = (whole / "out" / "results.md").read_text()
    assert "| OrdMoE | erl_coef 0." in table
    assert "- Intervals are 95 %" in table
    assert "no difference shown" in capsys.readouterr().out

    assert main([*recipe(whole, inputs), "--dry_run", "true"]) == 0
    output = capsys.readouterr().out
    assert output.count("done") == 8
    assert "0 runs remain" in output


def test_a_sweep_of_rewards_under_zscore_is_explained_and_run_once(inputs, tmp_path, capsys):
    cells = [{"name": f"scale {scale}", "rewards": [scale, scale / 2, 0]} for scale in (1, 2)]
    assert main([*recipe(tmp_path, inputs, cells=cells, tune=None), "--dry_run", "true"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "scale 1 and scale 2 are the same training" in output
    assert "zscore, which divides by their standard deviation, is blind to the scale of rewards" in output
    assert "6 runs remain" in output, "the base twice, SFT and one of the two cells for two seeds each"
    cells = [cell | {"advantages": "center"} for cell in cells]
    assert main([*recipe(tmp_path, inputs, cells=cells, tune=None), "--dry_run", "true"]) == 0
    output = capsys.readouterr().out
    assert "blind" not in output
    assert "8 runs remain" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": [{"grupping": "random"}]}, "names grupping, which an ablation cannot vary"),
        ({"grid": {"num_teirs": [2]}}, "grid names num_teirs"),
        ({"tune": {"lambda": [1]}}, "tune names lambda"),
        ({"baseline": {"C": 1}}, "baseline names C"),
        ({"grid": {"num_tiers": ["two"]}, "cells": None}, "num_tiers='two' cannot work"),
        ({"grid": {"num_tiers": [2, 5]}, "cells": None}, "num_tiers=5 does not fit"),
        ({"grid": {"advantages": ["ranked"]}, "cells": None}, "advantages='ranked' cannot work: invalid choice"),
        ({"cells": "[{]"}, "cells is not JSON"),
        ({"cells": ["random"]}, "cells must be mappings"),
        ({"tune": ["erl_coef"]}, "tune must be a mapping"),
        ({"dataset_test_split": "validation"}, "need a split each"),
        ({"test_limit": -1}, "test_limit must be at least 1, got -1"),
        ({"dataset_test_split": "tset"}, "tset"),
        ({"group_by": "color"}, "group_by='color' is not a column"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_users_get_wrong_is_said_before_anything_runs(inputs, tmp_path, capsys, changes, message):
    assert main(recipe(tmp_path, inputs, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "runs").exists()


def test_mappings_are_taken_as_json_from_the_command_line(inputs, tmp_path, capsys):
    options = ["--grid", '{"num_tiers": [2, 3]}', "--cells", "[]", "--tune", "{}", "--dry_run", "true"]
    assert main([*recipe(tmp_path, inputs), *options]) == 0
    output = capsys.readouterr().out
    assert "num_tiers 2" in output
    assert "8 runs remain" in output


def test_the_training_samples_follow_the_seed_and_the_cells_share_them(inputs, tmp_path, monkeypatch):
    seen = {}

    def recorded(load_base, config, args, seed, train_dataset, processing_class):
        seen[config.num_tiers, seed] = [row["content"] for prompt in train_dataset["prompt"] for row in prompt]
        return train_run(load_base, config, args, seed, train_dataset, processing_class)

    monkeypatch.setattr(runner, "train_run", recorded)
    assert main(recipe(tmp_path, inputs, tune=None, max_steps=1)) == 0
    assert all(len(prompts) == 4 for prompts in seen.values())
    assert seen[1, 0] == seen[3, 0]
    assert seen[1, 1] == seen[3, 1]
    assert seen[1, 0] != seen[1, 1]


def test_the_report_is_drawn_from_the_results(inputs, tmp_path):
    folder = tmp_path / "report"
    assert main([*recipe(tmp_path, inputs, tune=None, seeds=[0], max_steps=1), "--report", str(folder)]) == 0
    html = (folder / "report.html").read_text()
    assert all(cell["name"] in html for cell in results(tmp_path)["cells"])
    assert {"difference.png", "log_likelihood.png", "cost.png"} <= {path.name for path in folder.iterdir()}
