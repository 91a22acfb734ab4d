"""What the demos share: which commands they run, and the table they print."""

import json
from itertools import pairwise
from pathlib import Path

from examples import steps


def fake_ordmoe(calls: list[list[str]]):
    """A stand-in for `steps.ordmoe` that leaves the files which the command would."""

    def run(*arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        calls.append(words)
        option = dict(pairwise(words))
        if words[0] == "train":
            folder = Path(option["--output_dir"])
            folder.mkdir(parents=True)
            metrics = {"train_seconds_per_step": 0.25 * int(option["--num_tiers"]), "peak_memory_bytes": 2.5e9}
            (folder / "train_results.json").write_text(json.dumps(metrics))
        else:
            results = [
                {"accuracy": {"a": 0.5 / tier, "overall": 0.25}, "log_likelihood": -float(tier)} for tier in steps.TIERS
            ]
            Path(option["--output_file"]).write_text(json.dumps(results))

    return run


def test_both_adapters_get_equal_steps_and_the_table_shows_tier_1(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(steps, "ordmoe", fake_ordmoe(calls))
    story = steps.Story("recipe.yaml", "BASE", tmp_path, steps=7, questions=50, kinds=("a", "b"), max_new_tokens=4)
    story.compare("Data")

    options = [dict(pairwise(call)) for call in calls]
    assert [call[0] for call in calls] == ["train", "train", "evaluate", "evaluate", "evaluate"]
    assert [option["--num_tiers"] for option in options] == ["1", "3", "3", "3", "3"]
    assert [option["--max_steps"] for option in options[:2]] == ["7", "7"]
    assert [option.get("--adapter") for option in options[2:]] == [
        None,
        str(tmp_path / "sft"),
        str(tmp_path / "ordmoe"),
    ]
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if cells}
    accuracy_and_likelihood = ["50.0 %", "—", "25.0 %", "-1.00", "-2.00", "-3.00"]
    assert rows["base"] == [*accuracy_and_likelihood, "", ""]
    assert rows["SFT (C = 1)"] == [*accuracy_and_likelihood, "0.25", "2.50"]
    assert rows["OrdMoE (C = 3)"] == [*accuracy_and_likelihood, "0.75", "2.50"]
