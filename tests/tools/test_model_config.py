import pytest

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools import model_config
from ordmoe_peft.tools.model_config import read_config
from tests import models


def test_a_folder_and_its_file_are_read(tmp_path):
    models.qwen3_moe().config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert read_config(str(name)).model_type == "qwen3_moe"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a b", "a/b/c"])
def test_the_hub_is_not_asked_for_what_cannot_be_an_id(name, monkeypatch):
    monkeypatch.setattr(model_config.AutoConfig, "from_pretrained", None)
    with pytest.raises(OrdMoEModelError, match=f"There is no folder '{name}', and it is no hub id"):
        read_config(name, instead="Give another.")


def test_what_the_hub_does_not_have_is_named_with_the_reason(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't\nconnect.")

    monkeypatch.setattr(model_config.AutoConfig, "from_pretrained", unreachable)
    expected = "no folder 'nobody/nothing' here, and the hub gave no model of this id: We couldn't connect. Give"
    with pytest.raises(OrdMoEModelError, match=expected):
        read_config("nobody/nothing", instead="Give another.")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(OrdMoEModelError, match="holds no model: it has no config.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OrdMoEModelError, match="cannot be used: .*not a valid JSON"):
        read_config(str(tmp_path))
    for settings in ('"dtype": "float99"', '"rope_parameters": {"rope_type": "yarn"}', '"quantization_config": 3'):
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", ' + settings + "}")
        with pytest.raises(OrdMoEModelError, match="cannot be used"):
            read_config(str(tmp_path))
