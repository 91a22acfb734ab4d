"""`ordmoe precision` as a user types it; what it measures is tested beside `four_bits.py`."""

import json

from ordmoe import main
from tests.test_ordmoe import base, data, error_of  # noqa: F401 (fixtures)


def test_the_options_of_packing_are_those_of_the_model_in_4_bits(base, data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "results.json"
    arguments = ["precision", base, "--dataset_name", data, "--use_bnb_nested_quant", True, "--dtype", "bfloat16"]
    arguments += ["--bnb_4bit_quant_type", "fp4", "--limit", 4, "--output_file", output]
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert f"{base} in 4 bits (fp4, nested) beside bfloat16, on 4 samples of test" in printed
    assert "nats per answer token" in printed
    found = json.loads(output.read_text())
    assert (found["dtype"], found["num_samples"], found["dense_bits"]) == ("bfloat16", 4, 16)
    assert found["quantization"]["bnb_4bit_quant_type"] == "fp4"
    assert found["quantization"]["bnb_4bit_use_double_quant"] is True


def test_it_is_about_a_base_in_both_forms(base, data, capsys):  # noqa: F811
    """An adapter, tiers, or one form alone are not what it takes."""
    for option in ("--adapter", "--num_tiers", "--load_in_4bit"):
        wrong = ["precision", str(base), "--dataset_name", str(data), option, "1"]
        assert f"unknown option {option}" in error_of(capsys, wrong)
