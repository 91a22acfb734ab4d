"""The class that a model with OrdMoE adapters gets: saving whole, loading after a look at all files."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file, save_file

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "ordmoe.json"]


def files(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def tuned():
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    models.randomize_adapter(model)
    return model


@pytest.mark.parametrize(("task", "owner"), [(None, PeftModel), ("CAUSAL_LM", PeftModelForCausalLM)])
def test_the_model_is_of_pefts_class_too(task, owner):
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, task_type=task))
    assert isinstance(model, owner) and type(model).__name__ == f"OrdMoE{owner.__name__}"
    assert type(copy.deepcopy(model)) is type(model)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_other_methods_keep_pefts_class(tuned):
    plain = get_peft_model(models.qwen3_moe(), LoraConfig(target_modules=["q_proj"]))
    assert type(plain) is PeftModel
    assert not torch.nn.modules.module._global_module_registration_hooks


def test_waiting_for_an_owner_ends_with_the_tuner():
    from ordmoe_peft import OrdMoEModel

    tuner = OrdMoEModel(models.qwen3_moe(), OrdMoEConfig(r=4), "default")
    assert torch.nn.modules.module._global_module_registration_hooks
    del tuner
    import gc

    gc.collect()
    assert not torch.nn.modules.module._global_module_registration_hooks


def test_the_files_of_one_and_of_several_adapters(tuned, tmp_path):
    tuned.add_adapter("second", OrdMoEConfig(r=2))
    (tmp_path / "trainer_state.json").touch()
    tuned.save_pretrained(tmp_path)
    assert files(tmp_path) == sorted([*FILES, "second", "trainer_state.json"])
    assert files(tmp_path / "second") == FILES
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 2
    tuned.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert files(tmp_path / "one") == ["second"]
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "one", subfolder="second")
    assert loaded.peft_config["default"].r == 2


def test_a_state_dict_that_is_given_is_what_is_written(tuned, tmp_path):
    state = {name: torch.full_like(weight, 0.5) for name, weight in tuned.state_dict().items()}
    tuned.save_pretrained(tmp_path, state_dict=state)
    assert all((weight == 0.5).all() for weight in load_file(tmp_path / "adapter_model.safetensors").values())
    assert json.loads((tmp_path / "ordmoe.json").read_text())["probes"] is None
    PeftModel.from_pretrained(models.qwen3_moe(), tmp_path)


def test_a_process_that_is_not_the_main_one_writes_nothing(tuned, tmp_path):
    tuned.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"safe_serialization": False}, "would write a pickle"),
        ({"save_embedding_layers": True}, "weights of the base"),
        ({"selected_adapters": ["other"]}, r"no adapter 'other' to save, only \['default'\]"),
    ],
)
def test_what_is_not_saved(tuned, tmp_path, options, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        tuned.save_pretrained(tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_a_base_from_the_hub_is_named_by_its_id(tmp_path):
    base = models.qwen3_moe()
    base.config._name_or_path = f"/home/me/.cache/models--Qwen--Small/snapshots/{'ab' * 20}"
    base.name_or_path = base.config._name_or_path
    get_peft_model(base, OrdMoEConfig(r=4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Qwen/Small", "ab" * 20)
    assert "/home/me" not in "".join(file.read_text() for file in tmp_path.iterdir() if file.suffix == ".json")


def test_an_error_while_saving_leaves_what_was_there(tuned, tmp_path, monkeypatch):
    tuned.save_pretrained(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    models.randomize_adapter(tuned)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("ordmoe_peft.adapter.peft_model.write_record", full)
    with pytest.raises(OSError, match="No space"):
        tuned.save_pretrained(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_loading_into_an_adapter_that_is_there(tuned, tmp_path):
    tuned.save_pretrained(tmp_path / "same")
    other = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    other.load_adapter(tmp_path / "same", "default")
    batch = models.text_batch()
    assert torch.equal(other(**batch).logits, tuned.eval()(**batch).logits)
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, lora_alpha=1)).save_pretrained(tmp_path / "other_scale")
    with pytest.raises(OrdMoEConfigError, match="saved with lora_alpha=1; the adapter 'default' of this model has 8"):
        other.load_adapter(tmp_path / "other_scale", "default")
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, targets=["router"])).save_pretrained(tmp_path / "less")
    with pytest.raises(OrdMoEModelError, match="it has no base_model.*experts.*lora_A"):
        other.load_adapter(tmp_path / "less", "default")
    assert torch.equal(other(**batch).logits, tuned(**batch).logits)


@pytest.mark.parametrize("name", ["lora", "lora_A", "lora.x"])
def test_names_that_peft_takes_for_its_own(tuned, name):
    with pytest.raises(OrdMoEConfigError, match=f"name '{name}' begins with 'lora'"):
        tuned.add_adapter(name, OrdMoEConfig(r=4))
    assert list(tuned.peft_config) == ["default"]


def record(folder):
    return json.loads((folder / "ordmoe.json").read_text())


def test_an_adapter_that_is_trained_on_another_base_has_that_one_from_then_on(tuned, tmp_path):
    tuned.save_pretrained(tmp_path / "first")
    first = record(tmp_path / "first")
    base = models.qwen3_moe(norm_topk_prob=False)
    base.name_or_path = "second/base"
    options = {"ignore_fingerprint": True}
    PeftModel.from_pretrained(base, tmp_path / "first", **options).save_pretrained(tmp_path / "as it was")
    again = record(tmp_path / "as it was")
    assert (again["base"], again["probes"]) == (first["base"], first["probes"])
    base = models.qwen3_moe(norm_topk_prob=False)
    base.name_or_path = "second/base"
    trained = PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True, **options)
    trained.save_pretrained(tmp_path / "trained")
    saved = record(tmp_path / "trained")
    assert (saved["base"]["id"], saved["base"]["config"]["norm_topk_prob"]) == ("second/base", False)
    assert saved["probes"] != first["probes"]
    settings = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "second/base"
    with pytest.raises(OrdMoEModelError, match="norm_topk_prob is False"):
        PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "trained")


def test_an_adapter_trained_on_in_4_bits_has_that_recipe(tuned, tmp_path):
    tuned.save_pretrained(tmp_path / "dense")
    packed = quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig())
    with pytest.warns(UserWarning, match="trained on a base that was dense"):
        trained = PeftModel.from_pretrained(packed, tmp_path / "dense", is_trainable=True)
    trained.save_pretrained(tmp_path / "packed")
    assert record(tmp_path / "packed")["base"]["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert trained.peft_config["default"].base_quantization["bnb_4bit_quant_type"] == "nf4"


def test_only_the_weights_of_a_run_are_said_to_be_of_it(tuned, tmp_path):
    tuned.ordmoe_training = {"figures": {"steps": 7}}
    tuned.save_pretrained(tmp_path / "trained")
    PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "trained").save_pretrained(tmp_path / "loaded")
    assert record(tmp_path / "loaded")["training"] == {"figures": {"steps": 7}}
    new = get_peft_model(models.qwen3_moe(), OrdMoEConfig.from_pretrained(tmp_path / "trained"))
    new.save_pretrained(tmp_path / "new")
    assert record(tmp_path / "new")["training"] is None


def test_a_saved_configuration_that_looks_like_a_new_one_is_not_loaded_unchecked(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    (tmp_path / "ordmoe.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"base_moe": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"unknown": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(OrdMoEConfigError, match="has no base_moe"):
        tuned.load_adapter(tmp_path, "second")
    with pytest.raises(OrdMoEModelError, match="has no base_model"):
        PeftModel.from_pretrained(models.qwen3_moe(), tmp_path)
