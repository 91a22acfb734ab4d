"""`ordmoe import`: a LoRA adapter of another tool."""

from peft import LoraConfig, PeftModel, get_peft_model

from ordmoe import main
from ordmoe_peft.adapter.config import OrdMoEConfig
from tests import models
from tests.test_ordmoe import error_of


def test_a_plain_adapter_is_imported(tmp_path, capsys):
    model = models.qwen3_moe()
    model.save_pretrained(tmp_path / "base")
    names = [f"model.layers.{i}.mlp.experts.{name}" for i in range(3) for name in ("gate_up_proj", "down_proj")]
    get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names)).save_pretrained(
        tmp_path / "lora"
    )
    arguments = ["import", str(tmp_path / "lora"), str(tmp_path / "base"), "--num_tiers", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "ours")]) == 0
    assert "Read as peft: LoRA of rank 2 on experts, 6 weights" in capsys.readouterr().out
    config = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "ours").peft_config["default"]
    assert isinstance(config, OrdMoEConfig) and config.num_tiers == 2
    assert config.base_model_name_or_path == str(tmp_path / "base")


def test_what_is_missing_is_named(tmp_path, capsys):
    assert "MODEL is missing" in error_of(capsys, ["import", "somewhere", "--output_dir", str(tmp_path)])
