"""What an ablation runs, in which order, and what it makes of the results; the runs themselves are made up."""

import json

import pytest

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.ablate.ablation import Ablation, Cell, RunFiles, make_cells


SPLITS = {"tune": "validation", "final": "test"}
BASELINE = Cell("SFT", {"num_tiers": 1})


class Bench:
    """Makes up results: on validation the larger erl_coef answers more, on test the smaller one."""

    def __init__(self):
        self.executed = []

    def key(self, run):
        changes = {"num_tiers": 3, **(run.changes or {})}
        adapter = {"num_tiers": changes.pop("num_tiers")}
        evaluation = {"split": SPLITS[run.phase]}
        return {"adapter": adapter, "changes": changes, "seed": run.seed, "evaluation": evaluation}

    def have_effect(self, changes, names):
        return [name for name in names if changes.get("num_tiers") != 1 or name != "erl_coef"]

    def execute(self, run):
        self.executed.append(run)
        coef = (run.changes or {}).get("erl_coef", 0)
        right = 5 + round(10 * coef) if run.phase == "tune" else 8 - round(10 * coef)
        likelihood = [-1.0 + coef + 0.01 * (run.seed or 0)] * 10
        tiers = [-1.0, -2.0] if run.phase == "final" else None
        return {
            **({"seconds_per_step": 2.0} if run.changes is not None else {}),
            "evaluation": {
                "split": SPLITS[run.phase],
                "is_right": [1] * right + [0] * (10 - right),
                "log_likelihood": likelihood,
                "tier_log_likelihood": tiers,
            },
        }


def ablation(folder, bench, **changes):
    settings = {
        "baseline": BASELINE,
        "cells": [Cell("OrdMoE"), Cell("fixed", {"erl_coef": 0.4})],
        "tune": {"erl_coef": [0.1, 0.3, 0.2]},
        "seeds": [0, 1],
        "tune_seeds": [7],
        "metric": "accuracy",
        **changes,
    }
    return Ablation(
        **settings, key=bench.key, have_effect=bench.have_effect, execute=bench.execute, files=RunFiles(folder)
    )


def test_settings_are_chosen_on_validation_and_test_is_read_once_for_them(tmp_path):
    """erl_coef 0.3 is best on validation and worst on test."""
    bench = Bench()
    results = ablation(tmp_path, bench).run()
    base, sft, ordmoe, fixed = results["cells"]
    assert ordmoe["chosen"] == {"erl_coef": 0.3}
    assert sft["chosen"] == fixed["chosen"] == {}
    phases = [run.phase for run in bench.executed]
    assert phases == sorted(phases, reverse=True), "a test split was read before all was chosen"
    finals = [(run.changes, run.seed) for run in bench.executed if run.phase == "final"]
    assert finals == [
        (None, None),
        *(({"num_tiers": 1}, seed) for seed in (0, 1)),
        *(({"erl_coef": 0.3}, seed) for seed in (0, 1)),
        *(({"erl_coef": 0.4}, seed) for seed in (0, 1)),
    ]
    assert {run.seed for run in bench.executed if run.phase == "tune"} == {None, 7}
    assert (base["mean"], sft["mean"], ordmoe["mean"], fixed["mean"]) == (80, 80, 50, 40)
    for path in tmp_path.glob("tune_*"):
        assert json.loads(path.read_text())["evaluation"]["split"] == "validation"


def test_results_have_the_shape_that_the_report_draws(tmp_path):
    """OrdMoE answers 5 of 10 where SFT answers 8: three items lost, the same for both seeds."""
    results = ablation(tmp_path, Bench()).run()
    assert (results["baseline"], results["metric"], results["unit"]) == ("SFT", "accuracy", "%")
    assert [cell["name"] for cell in results["cells"]] == ["base", "SFT", "OrdMoE", "fixed"]
    base, sft, ordmoe, _ = results["cells"]
    assert sft["difference"] is None
    assert sft["per_seed"] == [80, 80]
    assert base["per_seed"] == [80]
    assert base["seconds_per_step"] is None
    assert set(ordmoe) == set(sft) == set(base)
    assert ordmoe["difference"]["mean"] == pytest.approx(-30)
    assert ordmoe["difference"]["low"] < -30 < ordmoe["difference"]["high"]
    assert ordmoe["log_likelihood"]["mean"] == pytest.approx(-0.695)
    assert ordmoe["log_likelihood"]["difference"]["mean"] == pytest.approx(0.3)
    assert ordmoe["log_likelihood"]["difference"]["verdict"] == "gain"
    assert ordmoe["tier_log_likelihood"] == [-1, -2]
    assert ordmoe["seconds_per_step"] == 2
    assert any("2 cells are compared" in note for note in results["notes"])


def test_of_equal_settings_the_likelier_wins(tmp_path):
    """The metric is rounded to tenths: 0.11 and 0.13 answer the same."""
    tuned = ablation(tmp_path, Bench(), tune={"erl_coef": [0.11, 0.13, 0.12]})
    assert tuned.choose(Cell("OrdMoE")) == {"erl_coef": 0.13}


def test_a_diverged_setting_is_not_chosen(tmp_path):
    bench = Bench()
    honest = bench.execute

    def execute(run):
        record = honest(run)
        if (run.changes or {}).get("erl_coef") == 0.3:
            record["evaluation"]["log_likelihood"] = [float("nan")] * 10
        return record

    bench.execute = execute
    tuned = ablation(tmp_path, bench, metric="log_likelihood")
    assert tuned.choose(Cell("OrdMoE")) == {"erl_coef": 0.2}


def test_below_the_base_is_said(tmp_path):
    """The base answers 5 of 10 on validation; negative coefficients answer fewer."""
    results = ablation(tmp_path, Bench(), tune={"erl_coef": [-0.1, -0.3]}).run()
    (note,) = [note for note in results["notes"] if "below the base" in note]
    assert note.startswith("OrdMoE: its best setting on validation (accuracy 40) is below the base as it is (50)")


def test_only_cells_whose_every_candidate_is_equal_are_the_same_training(tmp_path):
    """A cell that fixes what the other chooses from is another training, even where the common value is the same."""
    same = ablation(tmp_path, Bench(), cells=[Cell("one"), Cell("two"), Cell("fixed", {"erl_coef": 0.1})]).same_runs()
    assert same == ["one and two are the same training, so they share their runs."]


def test_one_seed_is_said_to_cover_items_only(tmp_path):
    results = ablation(tmp_path, Bench(), seeds=[0]).run()
    assert "cover the choice of items only" in results["notes"][0]
    assert results["cells"][1]["stderr"] is None


def test_an_interrupted_ablation_goes_on_where_it_stopped(tmp_path):
    whole = ablation(tmp_path / "whole", Bench()).run()
    interrupted = Bench()
    honest = interrupted.execute

    def execute(run):
        if len(interrupted.executed) == 6:
            raise KeyboardInterrupt
        return honest(run)

    interrupted.execute = execute
    with pytest.raises(KeyboardInterrupt):
        ablation(tmp_path / "parts", interrupted).run()
    rest = Bench()
    assert ablation(tmp_path / "parts", rest).run() == whole
    assert len(interrupted.executed) == 6
    assert not [run for run in rest.executed if run in interrupted.executed]
    assert len(rest.executed) == len(list((tmp_path / "whole").iterdir())) - 6


def test_ablations_in_one_folder_share_runs(tmp_path):
    ablation(tmp_path, Bench()).run()
    second = Bench()
    ablation(tmp_path, second, cells=[Cell("another", {"grouping": "random", "erl_coef": 0.1})]).run()
    assert {tuple(run.changes.items()) for run in second.executed} == {(("grouping", "random"), ("erl_coef", 0.1))}


def test_a_plan_knows_what_is_done_and_what_depends_on_a_choice(tmp_path):
    bench = Bench()
    planned = ablation(tmp_path, bench)
    states = {(name, run.phase): done for name, run, done in planned.planned()}
    assert states["OrdMoE", "tune"] is False
    assert states["OrdMoE", "final"] is None
    assert states["fixed", "final"] is False
    assert ("SFT", "tune") not in states
    planned.choose(Cell("OrdMoE"))
    states = {(name, run.phase): done for name, run, done in planned.planned()}
    assert states["OrdMoE", "tune"] is True
    assert states["OrdMoE", "final"] is False


def test_a_run_on_the_wrong_split_is_not_taken(tmp_path):
    bench = Bench()
    honest = bench.execute
    bench.execute = lambda run: honest(run) | {"evaluation": honest(run)["evaluation"] | {"split": "test"}}
    with pytest.raises(AssertionError, match="another split than validation"):
        ablation(tmp_path, bench).run()


def test_cells_are_the_grid_and_the_list():
    cells = make_cells({"grouping": ["uniform", "random"], "num_tiers": [2, 3]}, [{"name": "mine", "erl_coef": 1.0}])
    assert [cell.name for cell in cells] == [
        *("grouping uniform, num_tiers 2", "grouping uniform, num_tiers 3"),
        *("grouping random, num_tiers 2", "grouping random, num_tiers 3", "mine"),
    ]
    assert cells[2].settings == {"grouping": "random", "num_tiers": 2}
    assert cells[4].settings == {"erl_coef": 1.0}
    assert make_cells(None, None) == [Cell("OrdMoE")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f1"}, "metric must be one of .* got 'f1'"),
        ({"seeds": [1, 1]}, r"seeds must be one or more different numbers, got \[1, 1\]"),
        ({"tune": {"erl_coef": 0.1}}, "tune: erl_coef needs a list of values to try, got 0.1"),
        ({"cells": [Cell("SFT")]}, "Two rows of the table are called 'SFT'"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        ablation(tmp_path, Bench(), **changes)
