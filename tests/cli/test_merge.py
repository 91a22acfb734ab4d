"""What `ordmoe merge` reads and prints; what it writes is tested in `tests/tools/merge_on_disk`."""

import pytest
import torch
from peft import get_peft_model

from ordmoe import main
from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.cli.merge import build_parser
from tests import models
from tests.test_ordmoe import error_of


def test_options_and_their_defaults():
    (options,) = build_parser().parse_args_and_config(["--adapter", "a", "--output_dir", "b"])
    assert options.written_dtype() is None
    assert options.quantization_config() is None
    assert (options.max_shard_size, options.requantize, options.model_name_or_path) == ("5GB", False, "")
    (options,) = build_parser().parse_args_and_config(
        ["a", "b", "--output_dir", "c", "--dtype", "float16", "--load_in_4bit"]
    )
    assert options.written_dtype() is torch.float16
    assert options.quantization_config().bnb_4bit_quant_type == "nf4"
    assert (options.adapter, options.model_name_or_path, options.output_dir) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "x"], "ADAPTER is missing"),
        (["my-adapter"], "arguments are required: --output_dir"),
        (
            ["my-adapter", "--output_dir", "x", "--dtype", "int8"],
            "choose from 'auto', 'bfloat16'",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(arguments, message, capsys):
    assert message in error_of(capsys, ["merge", *arguments])


def test_the_adapter_comes_first_and_a_table_says_what_was_done(tmp_path, capsys):
    base = models.qwen3_moe()
    base.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(type(base).from_pretrained(tmp_path / "base"), OrdMoEConfig())
    tuned.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'adapter'} merged into {tmp_path / 'base'}" in printed
    assert f"│ {3 * models.NUM_LAYERS} " in printed
    assert f"Merged model in {tmp_path / 'merged'}" in printed
    assert "Warning" not in printed
