"""What an ablation runs, in which order, and what it makes of the results; the runs themselves are made up."""

import pytest

from ordmoe_peft import OrdMoETrainingArguments
from ordmoe_peft.cli.arguments import AdapterArguments
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.ablate.ablation import Ablation
from ordmoe_peft.tools.ablate.grid import AblateArguments, Cell
from ordmoe_peft.tools.ablate.runner import AblationRunner
from ordmoe_peft.tools.ablate.settings import Settings


ORDMOE = Cell("OrdMoE")


class MadeUp(AblationRunner):
    """Makes up results: on validation the larger erl_coef answers more, on test the smaller one."""

    gain = 1

    def __init__(self, arguments, folder):
        training = OrdMoETrainingArguments(str(folder), bf16=False, use_cpu=True)
        super().__init__(arguments, Settings(AdapterArguments(), training, {}), *[lambda: None] * 3)
        self.executed = []

    def execute(self, run):
        self.executed.append(run)
        coef = self.gain * (run.changes or {}).get("erl_coef", 0)
        right = 5 + round(10 * coef) if run.phase == "tune" else 8 - round(10 * coef)
        return {
            **({"seconds_per_step": 2.0} if run.changes is not None else {}),
            "evaluation": {
                "split": "validation" if run.phase == "tune" else "test",
                "is_right": [1] * right + [0] * (10 - right),
                "log_likelihood": [-1.0 + coef + 0.01 * (run.seed or 0)] * 10,
                "tier_log_likelihood": [-1.0, -2.0] if run.phase == "final" else None,
            },
        }


def ablation(folder, runner=MadeUp, **changes):
    arguments = AblateArguments(
        **{
            "baseline": {"name": "SFT", "num_tiers": 1},
            "cells": [{"name": "OrdMoE"}, {"name": "fixed", "erl_coef": 0.4}],
            "tune": {"erl_coef": [0.1, 0.3, 0.2]},
            "seeds": [0, 1],
            "tune_seeds": [7],
            **changes,
        }
    )
    return Ablation(arguments, runner(arguments, folder))


def test_settings_are_chosen_on_validation_and_test_is_read_once_for_them(tmp_path):
    """erl_coef 0.3 is best on validation and worst on test."""
    made_up = ablation(tmp_path)
    results, executed = made_up.run(), made_up.runner.executed
    base, sft, ordmoe, fixed = results["cells"]
    assert ordmoe["chosen"] == {"erl_coef": 0.3}
    assert sft["chosen"] == fixed["chosen"] == {}
    phases = [run.phase for run in executed]
    assert phases == sorted(phases, reverse=True), "a test split was read before all was chosen"
    finals = [(run.changes, run.seed) for run in executed if run.phase == "final"]
    assert finals == [
        (None, None),
        *(({"num_tiers": 1}, seed) for seed in (0, 1)),
        *(({"erl_coef": 0.3}, seed) for seed in (0, 1)),
        *(({"erl_coef": 0.4}, seed) for seed in (0, 1)),
    ]
    assert {run.seed for run in executed if run.phase == "tune"} == {None, 7}
    assert (base["mean"], sft["mean"], ordmoe["mean"], fixed["mean"]) == (80, 80, 50, 40)


def test_results_have_the_shape_that_the_report_draws(tmp_path):
    """OrdMoE answers 5 of 10 where SFT answers 8: three items lost, the same for both seeds."""
    results = ablation(tmp_path).run()
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
    assert ordmoe["accuracy"]["difference"] == ordmoe["difference"]
    assert ordmoe["tier_log_likelihood"] == [-1, -2]
    assert ordmoe["seconds_per_step"] == 2
    assert any("2 cells are compared" in note for note in results["notes"])


def test_of_equal_settings_the_likelier_wins(tmp_path):
    """The metric is rounded to tenths: 0.11 and 0.13 answer the same."""
    tuned = ablation(tmp_path, tune={"erl_coef": [0.11, 0.13, 0.12]})
    assert tuned.choose(ORDMOE) == {"erl_coef": 0.13}


def test_a_diverged_setting_is_not_chosen(tmp_path):
    class Diverging(MadeUp):
        def execute(self, run):
            record = super().execute(run)
            if (run.changes or {}).get("erl_coef") == 0.3:
                record["evaluation"]["log_likelihood"] = [float("nan")] * 10
            return record

    tuned = ablation(tmp_path, Diverging, metric="log_likelihood")
    assert tuned.choose(ORDMOE) == {"erl_coef": 0.2}


def test_below_the_base_is_said(tmp_path):
    """The base answers 5 of 10 on validation; here, larger coefficients answer fewer."""

    class Harmful(MadeUp):
        gain = -1

    cells = [{"name": "OrdMoE"}]
    results = ablation(tmp_path, Harmful, cells=cells, tune={"erl_coef": [0.1, 0.2]}).run()
    (note,) = [note for note in results["notes"] if "below the base" in note]
    assert note.startswith("OrdMoE: its best setting on validation (accuracy 40) is below the base as it is (50)")


def test_only_cells_whose_every_candidate_is_equal_are_the_same_training(tmp_path):
    """A cell that fixes what the other chooses from is another training, even where the common value is the same."""
    same = ablation(tmp_path, cells=[{"name": "one"}, {"name": "two"}, {"name": "fixed", "erl_coef": 0.1}]).same_runs()
    assert same == ["one and two are the same training, so they share their runs."]


def test_one_seed_is_said_to_cover_items_only(tmp_path):
    results = ablation(tmp_path, seeds=[0]).run()
    assert "cover the choice of items only" in results["notes"][0]
    assert results["cells"][1]["stderr"] is None


def test_an_interrupted_ablation_goes_on_where_it_stopped(tmp_path):
    class Interrupted(MadeUp):
        def execute(self, run):
            if len(self.executed) == 6:
                raise KeyboardInterrupt
            return super().execute(run)

    whole = ablation(tmp_path / "whole").run()
    interrupted, rest = ablation(tmp_path / "parts", Interrupted), ablation(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert rest.run() == whole
    before, after = interrupted.runner.executed, rest.runner.executed
    assert len(before) == 6
    assert not [run for run in after if run in before]
    assert len(after) == len(list((tmp_path / "whole" / "runs").iterdir())) - 6


def test_ablations_in_one_folder_share_runs(tmp_path):
    ablation(tmp_path).run()
    second = ablation(tmp_path, cells=[{"name": "another", "grouping": "random", "erl_coef": 0.1}])
    second.run()
    changes = {tuple(run.changes.items()) for run in second.runner.executed}
    assert changes == {(("grouping", "random"), ("erl_coef", 0.1))}


def test_a_plan_knows_what_is_done_and_what_depends_on_a_choice(tmp_path):
    planned = ablation(tmp_path)
    states = {(name, run.phase): done for name, run, done in planned.planned()}
    assert states["OrdMoE", "tune"] is False
    assert states["OrdMoE", "final"] is None
    assert states["fixed", "final"] is False
    assert ("SFT", "tune") not in states
    planned.choose(ORDMOE)
    states = {(name, run.phase): done for name, run, done in planned.planned()}
    assert states["OrdMoE", "tune"] is True
    assert states["OrdMoE", "final"] is False


def test_equal_runs_that_remain_count_once(tmp_path):
    """The base twice, SFT for two seeds; one choice of three between two equal cells, and their final runs."""
    planned = ablation(tmp_path, cells=[{"name": "one"}, {"name": "two"}])
    assert planned.remaining() == 2 + 2 + 3 + 2 * 2
    planned.choose(ORDMOE)
    assert planned.remaining() == 2 + 2 + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": {"erl_coef": 0.1}}, "tune: erl_coef needs a list of values to try, got 0.1"),
        ({"cells": [{"name": "SFT"}]}, "Two rows of the table are called 'SFT'"),
        ({"cells": [{"name": "base"}]}, "Two rows of the table are called 'base'"),
        ({"cells": [{"name": "wrong", "grouping": "sorted"}]}, "grouping='sorted' cannot work: invalid choice"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        ablation(tmp_path, **changes)
