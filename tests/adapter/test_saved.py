"""A saved adapter whose weights do not fit leaves the model, and what is loaded already, as they were."""

import json
from copy import deepcopy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.record import file_hash
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models
from tests.adapter.test_attachment import EVERYTHING, State


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_tensor(folder):
    state = load_file(folder / "adapter_model.safetensors")
    del state[min(state)]
    save_file(state, folder / "adapter_model.safetensors")


def with_a_tensor_more(folder):
    state = load_file(folder / "adapter_model.safetensors")
    save_file(state | {"base_model.model.model.layers.7.mlp.gate.lora_A.weight": torch.ones(1)}, folder / FILE)


def with_another_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))


def only_a_pickle(folder):
    torch.save(load_file(folder / FILE), folder / "adapter_model.bin")
    (folder / FILE).unlink()


def changed(change):
    """Damage that changes the first tensor of experts, and writes the record anew."""

    def damage(folder):
        state = load_file(folder / FILE)
        name = next(name for name in sorted(state) if "experts" in name)
        state[name] = change(state[name])
        save_file(state, folder / FILE)
        record = json.loads((folder / "ordmoe.json").read_text())
        record["weights"]["sha256"] = file_hash(folder / FILE)
        (folder / "ordmoe.json").write_text(json.dumps(record))

    return damage


def with_a_nan(value):
    value[0, 0] = float("nan")
    return value


def with_a_weight_of_the_base(folder):
    state = load_file(folder / FILE)
    save_file(state | {"base_model.model.lm_head.weight": torch.zeros(96, 64)}, folder / FILE)


def without(name):
    def damage(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        del config[name]
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return damage


FILE = "adapter_model.safetensors"
DAMAGE = [
    (only_a_pickle, OrdMoEConfigError, "no adapter_model.safetensors, and adapter_model.bin, a pickle, is never read"),
    (changed(with_a_nan), OrdMoEConfigError, r"safetensors has 1 of \d+ numbers in base_model.*experts.* that are NaN"),
    (changed(lambda value: value / 0), OrdMoEConfigError, "numbers in base_model.*experts.* NaN or infinite"),
    (changed(lambda value: value.to(torch.int32)), OrdMoEConfigError, "experts.*lora_A.weight in I32; an adapter's"),
    (changed(lambda value: value.to(torch.float8_e4m3fn)), OrdMoEConfigError, "experts.*lora_A.weight in F8_E4M3"),
    (with_a_weight_of_the_base, OrdMoEModelError, "safetensors .*it has base_model.model.lm_head.weight, which is no"),
    (without("lora_alpha"), OrdMoEConfigError, "adapter_config.json has no lora_alpha"),
    (without("use_rslora"), OrdMoEConfigError, "a setting was changed or removed|use_rslora is None there"),
    (lambda folder: (folder / FILE).unlink(), OrdMoEConfigError, "no adapter_model.safetensors"),
    (cut, OrdMoEConfigError, "adapter_model.safetensors cannot be read"),
    (without_a_tensor, OrdMoEModelError, "adapter_model.safetensors .*it has no base_model.*lora_A.weight. Load"),
    (with_a_tensor_more, OrdMoEModelError, r"layers.7.mlp.gate.lora_A.weight, which is no weight of the adapter"),
    (with_another_rank, OrdMoEConfigError, "ordmoe.json is of another adapter_config.json: r is 5 there and 4 here"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_an_adapter_whose_file_does_not_fit(damage, error, message, tmp_path):
    saved = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, targets=EVERYTHING))
    saved.save_pretrained(tmp_path / "whole")
    saved.save_pretrained(tmp_path / "broken")
    damage(tmp_path / "broken")
    model = models.qwen3_moe()
    before = State(model)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(model, tmp_path / "broken")
    before.check()

    tuned = PeftModel.from_pretrained(model, tmp_path / "whole")
    names = dict(tuned.named_parameters()).keys()
    with pytest.raises(error, match=message):
        tuned.load_adapter(tmp_path / "broken", "second")
    assert list(tuned.peft_config) == ["default"]
    assert dict(tuned.named_parameters()).keys() == names
    tuned.load_adapter(tmp_path / "whole", "second")


def test_weights_that_do_not_fit_a_trained_adapter_leave_it(tmp_path):
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=5)).save_pretrained(tmp_path)
    tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    models.randomize_adapter(tuned)
    before = deepcopy(dict(tuned.state_dict()))
    with pytest.raises(OrdMoEConfigError, match="saved with r=5; the adapter 'default' of this model has 4"):
        tuned.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


def test_a_saved_adapters_configuration_may_begin_a_new_one(tmp_path):
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    config = OrdMoEConfig.from_pretrained(tmp_path)
    config.base_moe = None
    assert get_peft_model(models.qwen3_moe(), config).peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, "has no base_model"),
        (only_a_pickle, "someone/adapter has no adapter_model.safetensors on the"),
    ],
)
def test_an_adapter_in_the_cache_of_the_hub_is_looked_at(damage, message, tmp_path, monkeypatch):
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).save_pretrained(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    snapshot = tmp_path / "cache" / "models--someone--adapter" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "adapter").rename(snapshot)
    refs = tmp_path / "cache" / "models--someone--adapter" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = models.qwen3_moe()
    before = State(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, "someone/adapter", cache_dir=tmp_path / "cache")
    before.check()


def test_a_folder_of_a_repository_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--someone--adapters"
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).save_pretrained(repository / "snapshots" / ("0" * 40) / "one")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    where = {"subfolder": "one", "cache_dir": tmp_path / "cache"}
    tuned = PeftModel.from_pretrained(models.qwen3_moe(), "someone/adapters", **where)
    tuned.load_adapter("someone/adapters", "second", **where)
    tuned.load_adapter("someone/adapters", "default", **where)
    assert list(tuned.peft_config) == ["default", "second"]


def test_what_is_no_folder_and_no_id():
    tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    for name in ("default", "second"):
        with pytest.raises(OrdMoEConfigError, match="There is no folder /no/such/folder, and on the hub nothing"):
            tuned.load_adapter("/no/such/folder", name)
