"""`ordmoe families` as a user types it."""

import json

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from ordmoe import main
from ordmoe_peft.tools.plan import known_models
from tests import models
from tests.test_ordmoe import error_of


@pytest.fixture
def folder(tmp_path):
    """A configuration alone, without weights."""
    models.qwen3_moe().config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_that_is_covered(folder, tmp_path, capsys):
    results = tmp_path / "families.json"
    assert main(["families", str(folder), "--output_file", str(results)]) == 0
    printed = capsys.readouterr().out
    assert "MoE layers of Qwen3MoeForCausalLM, which has 3 decoder layers" in printed
    for shown in ("layers 0-2", "Qwen3MoeTopKRouter", "up to 4", "model.layers.*.mlp.experts.gate_up_proj"):
        assert shown in printed
    assert "Tiers: yes" in printed
    assert "LoRA: yes" in printed
    assert "4 bits: yes" in printed
    assert "shared_experts" not in printed  # it has none
    report = json.loads(results.read_text())
    assert report["model_class"] == "Qwen3MoeForCausalLM"
    assert report["layers"][0]["decoder_layers"] == [0, 1, 2]
    assert report["refused"] == {}


def test_what_is_refused_is_said_with_its_reason(tmp_path, capsys):
    config = models.gpt_oss().config
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    assert main(["families", str(tmp_path)]) == 0
    printed, logged = capsys.readouterr()
    assert f"4 bits: refused: {tmp_path} is quantised by mxfp4, so it cannot be loaded in 4 bits." in printed
    assert "Tiers: yes" in printed
    assert "leaves fused experts as they are" not in logged


@pytest.mark.parametrize("name", ["Mixtral-8x7B", "FOLDER/config.json"])
def test_other_names_of_models(folder, capsys, name):
    """One whose configuration is shipped, and a file."""
    assert main(["families", name.replace("FOLDER", str(folder))]) == 0
    assert "Tiers: yes" in capsys.readouterr().out


OWN_CODE = """
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

class OwnConfig(Qwen3MoeConfig):
    model_type = "own_moe"

class OwnForCausalLM(Qwen3MoeForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_that_brings_its_own_code(folder, code_cache, capsys):
    (folder / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_moe", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["families", str(folder), "--trust_remote_code", "true"]) == 0
    assert "MoE layers of OwnForCausalLM" in capsys.readouterr().out
    assert "trust_remote_code" in error_of(capsys, ["families", str(folder)])


def test_a_model_without_moe_layers(tmp_path, capsys):
    models.qwen3_dense().config.save_pretrained(tmp_path)
    assert "has no MoE layers" in error_of(capsys, ["families", str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"model_type": "qwen3_moe"', "is not a valid JSON file"),
        ("{}", "Unrecognized model"),
        ('{"model_type": "nothing"}', "has model type `nothing`"),
        ('{"model_type": "olmoe", "num_experts": "x"}', "Field 'num_experts' expected int, got str (value: 'x')"),
    ],
)
def test_a_broken_configuration(tmp_path, capsys, text, reason):
    (tmp_path / "config.json").write_text(text)
    error = error_of(capsys, ["families", str(tmp_path)])
    assert f"The configuration of {str(tmp_path)!r} cannot be used" in error
    assert reason in error


def test_a_folder_without_a_configuration(tmp_path, capsys):
    assert f"The folder {str(tmp_path)!r} holds no model" in error_of(capsys, ["families", str(tmp_path)])


def test_an_unknown_model(capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled("no hub")

    monkeypatch.setattr(known_models.AutoConfig, "from_pretrained", offline)
    assert "There is no folder 'nobody/nothing' here" in error_of(capsys, ["families", "nobody/nothing"])


def test_a_model_has_to_be_named(capsys):
    assert "MODEL is missing" in error_of(capsys, ["families"])
