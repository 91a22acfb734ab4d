"""`ordmoe export`: the adapter for plain PEFT, and folders that hold none."""

from peft import PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.cli.main import main
from tests import models
from tests.cli.test_main import error_of


def test_plain_peft_loads_what_is_written(tmp_path, capsys):
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "plain")]) == 0
    assert f"Plain LoRA adapter in {tmp_path / 'plain'}" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "plain")
    assert loaded.peft_config["default"].peft_type == "LORA"


def test_a_folder_without_an_adapter(tmp_path, capsys):
    assert "is not a saved adapter" in error_of(capsys, ["export", str(tmp_path), "--output", str(tmp_path / "plain")])
