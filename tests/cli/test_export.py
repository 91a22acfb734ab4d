"""`ordmoe export`: the adapter for plain PEFT and for servers, and folders that hold none."""

import pytest
from peft import PeftModel, get_peft_model

from ordmoe import main
from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.cli.export import build_parser
from tests import models
from tests.test_ordmoe import error_of, save_base


@pytest.fixture
def adapter(tmp_path):
    """An adapter whose configuration names its base, which is beside it."""
    save_base(models.qwen3_moe(vocab_size=512), tmp_path / "base")
    model = type(models.qwen3_moe()).from_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, OrdMoEConfig(r=4))
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_plain_peft_loads_what_is_written(adapter, tmp_path, capsys):
    assert main(["export", adapter, "--output_dir", str(tmp_path / "plain")]) == 0
    assert f"Plain LoRA adapter in {tmp_path / 'plain'}" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(models.qwen3_moe(vocab_size=512), tmp_path / "plain")
    assert loaded.peft_config["default"].peft_type == "LORA"
    asked = ["export", adapter, "--output_dir", str(tmp_path / "other"), "--router", "drop"]
    assert "plain PEFT takes LoRA on routers" in error_of(capsys, asked)


def test_dropping_routers_prints_what_that_changes(adapter, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out"), "--to", "sglang"]
    assert "Pass --router fold" in error_of(capsys, ["export", adapter, *out])
    unserved = ["export", adapter, "--output_dir", str(tmp_path / "out"), "--to", "vllm-3d", "--router", "drop"]
    assert "Pass --to vllm-2d" in error_of(capsys, unserved), "before the base runs"
    assert main(["export", adapter, *out, "--router", "drop"]) == 0
    printed = capsys.readouterr().out
    assert "Routing without LoRA on routers" in printed and "mean" in printed and "No server has run" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_an_adapter_by_its_name_and_a_base_by_its_own(adapter, tmp_path):
    model = PeftModel.from_pretrained(models.qwen3_moe(vocab_size=512), adapter, adapter_name="second")
    model.save_pretrained(tmp_path / "several")
    arguments = ["export", str(tmp_path / "several"), "--adapter_name", "second", "--to", "vllm-2d"]
    assert main([*arguments, "--base", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_folder_without_an_adapter(tmp_path, capsys):
    assert "is not a saved adapter" in error_of(
        capsys, ["export", str(tmp_path), "--output_dir", str(tmp_path / "plain")]
    )
    assert "required: --output_dir" in error_of(capsys, ["export", str(tmp_path)])


def test_help_says_what_to_do_for_llama_cpp():
    assert "convert_hf_to_gguf.py" in build_parser().format_help()
