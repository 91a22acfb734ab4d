"""`ordmoe tiers` as a user types it."""

import json

import pytest
from peft import get_peft_model

from ordmoe import main
from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.monitoring.diagnostics import quality_findings
from tests import models, text
from tests.test_ordmoe import error_of


@pytest.fixture
def base(tmp_path):
    models.qwen3_moe().save_pretrained(tmp_path / "base")
    text.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    text.conversations(8).add_column("stars", [float(i) for i in range(8)]).to_parquet(tmp_path / "data/test.parquet")
    return tmp_path / "data"


def run(*arguments) -> int:
    return main(["tiers", *map(str, arguments)])


def test_measures_an_adapter_on_a_4_bit_base(base, data, tmp_path, capsys):
    adapted = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, num_tiers=4, grouping="high_only"))
    models.randomize_adapter(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    output, reports = tmp_path / "out" / "quality.json", tmp_path / "report"
    arguments = ["--dataset_name", data, "--adapter", tmp_path / "adapter", "--load_in_4bit", "--max_new_tokens", 2]
    arguments += ["--limit", 6, "--group_by", "kind", "--show", 2, "--output_file", output, "--report", reports]
    assert run(base, *arguments) == 0
    quality = json.loads(output.read_text())
    assert quality["model"] == str(tmp_path / "adapter")
    assert (quality["num_samples"], quality["num_tiers"], quality["grouping"]) == (6, 4, "high_only")
    assert len(quality["tiers"]) == len(quality["diversity"][0]) == len(quality["texts"][0]["answers"]) == 4
    assert len(quality["texts"]) == 2
    assert "Texts side by side" in (reports / "report.html").read_text()
    printed = capsys.readouterr().out
    for expected in ("even", "all tiers in order", "random groups", "cosine tier 4", "rho within tier 1", str(output)):
        assert expected in printed
    findings = quality_findings(quality)
    assert findings, "six samples and random weights show no order"
    assert all(finding.message in printed for finding in findings)


def test_options_override_the_adapters_settings(base, data, tmp_path, capsys):
    output = tmp_path / "quality.json"
    arguments = ["--model_name_or_path", base, "--dataset_name", data, "--num_tiers", 2, "--grouping", "high_only"]
    arguments += ["--rating_column", "stars", "--random_control", "false", "--max_new_tokens", 1, "--show", 0]
    assert run(*arguments, "--output_file", output) == 0
    quality = json.loads(output.read_text())
    assert (quality["num_tiers"], quality["grouping"]) == (2, "high_only")
    assert quality["spearman"]["quality"] == "rating"
    assert quality["order"]["full"]["random"] is None
    assert "side by side" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", 0], "limit must be at least 1, got 0"),
        (["--num_tiers", 5], "--num_tiers 5 does not fit"),
        (["--num_tiers", 1], "num_tiers must be at least 2"),
        (["--rating_column", "kind"], "needs a finite number in each row; row 0 has"),
        (["--rating_column", "score"], "--rating_column score is not a column"),
        (["--dataset_split", "nosuch"], "nosuch"),
    ],
    ids=str,
)
def test_what_users_get_wrong_is_one_line(base, data, capsys, options, message):
    error = error_of(capsys, ["tiers", str(base), "--dataset_name", str(data), *map(str, options)]).splitlines()[-1]
    assert error.startswith("ordmoe tiers: error: ")
    assert message in error
