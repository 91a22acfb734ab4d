"""What a run is told apart by, and what its file keeps; the training itself is made up."""

import json

import pytest

from ordmoe_peft import OrdMoETrainingArguments
from ordmoe_peft.cli.arguments import AdapterArguments
from ordmoe_peft.tools.ablate import runner as module
from ordmoe_peft.tools.ablate.grid import AblateArguments, Run
from ordmoe_peft.tools.ablate.runner import AblationRunner
from ordmoe_peft.tools.ablate.settings import Settings
from tests import text


SEEN = {"is_right": [1, 0], "log_likelihood": [-1.0, -2.0], "evaluate_seconds": 0.1}


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A runner whose trained model is the prompts that it was trained on."""

    def train_run(load_base, config, args, seed, train_dataset, processing_class):
        return [row["prompt"] for row in train_dataset], {"train_seconds": 1.0}

    def evaluate_run(model, processing_class, dataset, **evaluation):
        return {**SEEN, "model": model, "samples": len(dataset), "told": evaluation}

    monkeypatch.setattr(module, "train_run", train_run)
    monkeypatch.setattr(module, "evaluate_run", evaluate_run)
    training = OrdMoETrainingArguments(str(tmp_path), bf16=False, use_cpu=True)
    arguments = AblateArguments(train_limit=3, validation_limit=2, group_by="kind")
    settings = Settings(AdapterArguments(), training, {"data": arguments.training_data()})
    return AblationRunner(arguments, settings, lambda: "base", lambda: None, lambda split: text.conversations(8))


def test_a_run_is_kept_and_not_run_again(runner, monkeypatch):
    run = Run("tune", {"num_tiers": 2}, 0)
    assert not runner.is_done(run)
    record = runner.record(run)
    assert runner.is_done(run)
    assert runner.path(run).name.startswith("tune_c2_seed0_")
    assert record == json.loads(runner.path(run).read_text())
    assert record["key"] == runner.key(run)
    assert (record["phase"], record["seed"], record["train_seconds"]) == ("tune", 0, 1.0)
    assert (record["evaluation"]["split"], record["evaluation"]["samples"]) == ("validation", 2)
    assert record["evaluation"]["told"].keys() == {"scores_tiers", "batch_size", "group_by", "max_new_tokens"}
    monkeypatch.setattr(runner, "execute", lambda run: pytest.fail("run again"))
    assert runner.record(run) == record


def test_the_base_is_evaluated_without_training(runner):
    record = runner.record(Run("final", None))
    assert record["evaluation"]["model"] == "base"
    assert (record["evaluation"]["split"], record["evaluation"]["samples"]) == ("test", 8)
    assert record["evaluation"]["told"]["scores_tiers"]


def test_training_samples_follow_the_seed(runner):
    seen = [runner.execute(Run("final", {"num_tiers": c}, seed))["evaluation"]["model"] for c, seed in RUNS]
    assert [len(prompts) for prompts in seen] == [3, 3, 3]
    assert seen[0] == seen[1] != seen[2]


RUNS = ((1, 0), (3, 0), (3, 1))


def test_what_decides_a_result_tells_runs_apart(runner):
    run = Run("final", {"num_tiers": 2}, 0)
    others = [Run("tune", {"num_tiers": 2}, 0), Run("final", {"num_tiers": 2}, 1), Run("final", {"num_tiers": 3}, 0)]
    assert runner.path(run) not in {runner.path(other) for other in others}
    path = runner.path(run)
    runner.arguments.results_name = "other"
    assert runner.path(run) == path
    runner.arguments.max_new_tokens = 5
    assert runner.path(run) != path


def test_a_run_on_the_wrong_split_is_not_taken(runner):
    run = Run("tune", None)
    honest = runner.execute(run)
    runner.execute = lambda run: honest | {"evaluation": honest["evaluation"] | {"split": "test"}}
    with pytest.raises(AssertionError, match="another split than validation"):
        runner.record(run)
