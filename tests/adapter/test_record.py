"""`ordmoe.json`: what it says, and files beside it that are of another save."""

import json

import pytest
from peft import PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.saved import SavedAdapter
from ordmoe_peft.errors import OrdMoEConfigError
from tests import models


@pytest.fixture
def folder(tmp_path):
    config = OrdMoEConfig(r=4, lora_alpha=6, num_tiers=2, grouping="high_only")
    get_peft_model(models.qwen3_moe(), config).save_pretrained(tmp_path)
    return tmp_path


def change(file, **values):
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps(content))


def test_what_it_says(folder):
    record = json.loads((folder / "ordmoe.json").read_text())
    assert (record["format"], record["layout"]) == (1, "peft-fused-1")
    assert record["versions"].keys() == {"ordmoe-peft", "peft", "transformers", "torch"}
    settings = record["settings"]
    assert (settings["r"], settings["lora_alpha"], settings["num_tiers"], settings["grouping"]) == (
        4,
        6,
        2,
        "high_only",
    )
    assert record["base"]["class"] == "Qwen3MoeForCausalLM"
    assert record["base"]["config"]["num_experts_per_tok"] == 2
    assert "_name_or_path" not in record["base"]["config"]
    assert record["training"] is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_alpha", 60, "lora_alpha is 60 there and 6 here"),
        ("rewards", [1, 0], "rewards is .* there and None here"),
        ("use_dora", True, "a setting was changed"),
        ("target_parameters", ["x"], "a setting was changed"),
        ("one_more", 1, "a setting was changed"),
    ],
)
def test_an_edited_configuration_is_noticed(folder, field, value, message):
    change(folder / "adapter_config.json", **{field: value})
    with pytest.raises(OrdMoEConfigError, match=f"ordmoe.json is of another adapter_config.json: {message}"):
        PeftModel.from_pretrained(models.qwen3_moe(), folder)


def test_where_the_base_is_may_be_edited(folder):
    change(
        folder / "adapter_config.json", base_model_name_or_path="somewhere/else", revision="v2", inference_mode=False
    )
    PeftModel.from_pretrained(models.qwen3_moe(), folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 2, "format 2; this version of ordmoe_peft knows 1"),
        ("layout", "expert-fastest", "layout 'expert-fastest'; this version"),
        ("weights", {"sha256": "0" * 64}, "not the file that ordmoe.json was written for"),
    ],
)
def test_a_record_of_something_else(folder, field, value, message):
    change(folder / "ordmoe.json", **{field: value})
    with pytest.raises(OrdMoEConfigError, match=message):
        PeftModel.from_pretrained(models.qwen3_moe(), folder)


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "has no 'format'"), ("{}", "has no 'format'"), ("{", "is no JSON"), ("", "is no JSON")]
)
def test_a_record_that_is_none(folder, text, message):
    (folder / "ordmoe.json").write_text(text)
    with pytest.raises(OrdMoEConfigError, match=f"ordmoe.json {message}"):
        PeftModel.from_pretrained(models.qwen3_moe(), folder)


def test_an_adapter_without_one_is_loaded_with_a_warning(folder, caplog, monkeypatch):
    monkeypatch.setattr("ordmoe_peft.adapter.saved.logger.propagate", True, raising=False)
    (folder / "ordmoe.json").unlink()
    with caplog.at_level("WARNING"):
        tuned = PeftModel.from_pretrained(models.qwen3_moe(), folder)
    assert "has no ordmoe.json" in caplog.text
    tuned.save_pretrained(folder)
    assert (folder / "ordmoe.json").is_file()


def test_what_is_known_of_training_outlives_loading_and_saving(folder, tmp_path):
    known = {"data": "easy-VQA", "figures": {"steps": 3}}
    tuned = PeftModel.from_pretrained(models.qwen3_moe(), folder)
    tuned.ordmoe_training = known
    tuned.save_pretrained(tmp_path / "first")
    for is_trainable, training in ((False, known), (True, None)):  # what may have been trained on has other figures
        loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "first", is_trainable=is_trainable)
        loaded.save_pretrained(tmp_path / "second")
        assert json.loads((tmp_path / "second" / "ordmoe.json").read_text())["training"] == training


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("base", 3, "3 as base"),
        ("base.config", None, "None as base.config"),
        ("base.digest", "x", "'x' as base.digest"),
        ("base.digest.routers", {}, "no value as base.digest.routers.bfloat16"),
        ("weights", {}, "no value as weights.sha256"),
        ("settings.sha256", [], r"\[\] as settings.sha256"),
        ("probes.log_probs", 1, "1 as probes.log_probs"),
    ],
)
def test_a_damaged_record_is_refused(folder, path, value, message):
    record = json.loads((folder / "ordmoe.json").read_text())
    *owners, name = path.split(".")
    owner = record
    for part in owners:
        owner = owner[part]
    owner[name] = value
    (folder / "ordmoe.json").write_text(json.dumps(record))
    with pytest.raises(OrdMoEConfigError, match=f"ordmoe.json has {message}: it was edited or damaged"):
        SavedAdapter.read(folder)
