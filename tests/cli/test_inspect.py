"""`ordmoe inspect` as a user types it."""

import json

import pytest
import torch
from peft import get_peft_model

from ordmoe import main
from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.expert_selection import most_used_experts
from ordmoe_peft.cli.inspect import MAX_PRINTED_REASONS
from ordmoe_peft.moe_model import MoEModel
from tests import models
from tests.test_ordmoe import base, data, error_of, save_base  # noqa: F401 (fixtures)


def run(*arguments) -> int:
    return main(["inspect", *map(str, arguments)])


def test_a_fit_model_and_its_adapter(base, data, tmp_path, capsys):  # noqa: F811
    results = tmp_path / "out" / "health.json"
    assert run(base, "--dataset_name", data, "--limit", 4, "--output_file", results) == 0
    output = capsys.readouterr().out
    assert "Tiers can be cut: 3 (uniform)." in output
    assert "run `ordmoe tiers`" in output
    assert "Fit for OrdMoE" not in output
    assert "1.000 / 1.000 / 1.000" in output
    assert "overlap" not in output
    report = json.loads(results.read_text())
    assert report["is_fit"]
    assert report["model"] == str(base)
    assert f"{report['num_tokens']} tokens of train" in output
    chosen = most_used_experts(results, 0.5)
    assert chosen.keys() == {"0", "1", "2"} and all(
        1 <= len(experts) <= models.NUM_EXPERTS / 2 for experts in chosen.values()
    )

    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, num_tiers=2, grouping="high_only"))
    models.randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    arguments = (
        "--adapter",
        tmp_path / "adapter",
        "--dataset_split",
        "test",
        "--output_file",
        results,
        "--load_in_4bit",
    )
    assert run("--model_name_or_path", base, "--dataset_name", data, *arguments) == 0
    assert "overlap" in capsys.readouterr().out
    report = json.loads(results.read_text())
    assert report["layers"][0]["drift_kl"] > 0
    assert (report["num_tiers"], report["grouping"]) == (2, "high_only")


def test_dead_experts_are_named_in_the_log_and_the_report(data, tmp_path, capsys):  # noqa: F811
    model = models.gpt_oss()
    with torch.no_grad():
        MoEModel.of(model).layers[1].router.bias[:2] = -100.0
    folder, reports = save_base(model, tmp_path / "base"), tmp_path / "report"
    assert run(folder, "--dataset_name", data, "--report", reports) == 0
    named = "Dead experts (below 1% of an even share): 2 of 8 in layer 1"
    output = capsys.readouterr().out
    assert f"Warning (experts collapsing): {named}" in output
    assert "2 of its 8 experts are dead" in output and "Tiers can be cut" not in output
    assert named in (reports / "report.html").read_text()


def test_a_model_that_is_not_fit_is_a_result_not_an_error(data, tmp_path, capsys):  # noqa: F811
    olmoe = save_base(models.olmoe(num_hidden_layers=14), tmp_path / "olmoe")
    results = tmp_path / "health.json"
    arguments = ("--num_tiers", 5, "--limit", 2, "--grouping", "high_only", "--output_file", results)
    assert run(olmoe, "--dataset_name", data, *arguments) == 0
    output = capsys.readouterr().out
    assert "Not fit to be cut into 5 tiers (high_only):" in output
    assert "the largest num_tiers that fits is 4" in output
    hidden = len(json.loads(results.read_text())["reasons"]) - MAX_PRINTED_REASONS
    assert hidden >= 2
    assert f"… and {hidden} more; --output_file FILE has all of them." in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--grouping", "best"], "invalid choice: 'best'"), (["--num_tiers", "0"], "num_tiers must be at least 1")],
)
def test_what_users_get_wrong_is_one_line(base, data, capsys, arguments, message):  # noqa: F811
    assert message in error_of(capsys, ["inspect", str(base), "--dataset_name", str(data), *arguments])
