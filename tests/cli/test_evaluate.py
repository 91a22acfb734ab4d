"""`ordmoe evaluate` as a user types it; with an adapter, see test_ordmoe.py."""

import json

from tests.test_ordmoe import base, data, main  # noqa: F401 (fixtures)


def test_each_tier_is_a_row_with_the_accuracy_of_each_group(base, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "results.json"
    arguments = ["evaluate", "--model_name_or_path", base, "--dataset_name", data, "--tiers", 1, 2]
    arguments += ["--num_tiers", 2, "--group_by", "kind", "--max_new_tokens", 1, "--output_file", output]
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert "samples of test" in printed
    header = next(line for line in printed.splitlines() if "overall" in line)
    names = [cell.strip() for cell in header.strip("┃").split("┃")]
    assert names == ["tier", "even", "odd", "overall", "log-likelihood", "without end tokens"]
    top, _ = json.loads(output.read_text())
    assert f"{top['log_likelihood']:.3f}" in printed
    assert len(top["items"]["answers"]) == top["samples"]["overall"]
