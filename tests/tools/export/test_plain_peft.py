"""An exported adapter: what plain PEFT makes of it. In `tests/families` it reads those of every family."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.tools.export import plain_peft
from ordmoe_peft.tools.export.folder import EXPORT_NAME
from ordmoe_peft.tools.export.plain_peft import export_plain_lora
from tests import models
from tests.adapter.test_model import adapted, logits


FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", EXPORT_NAME}
BATCH = models.text_batch()
SHARED = ["router", "experts", "shared_experts", "attention"]


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(plain_peft.logger, "warning", said.append)
    return said


def read(folder, build=models.qwen3_moe):
    loaded = PeftModel.from_pretrained(build(), folder).eval()
    assert type(loaded.peft_config["default"]).__name__ == "LoraConfig"
    return loaded


def settings_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_adapter_file_has_pefts_keys_shapes_and_order(tmp_path):
    adapted(models.qwen3_moe()).save_pretrained(tmp_path / "adapter")
    export_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == FILES
    assert "num_tiers" not in settings_of(tmp_path / "plain")
    state = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    layer = "base_model.model.model.layers.0.mlp"
    E, H, F, r = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH, 6
    shapes = {name: tuple(value.shape) for name, value in state.items() if name.startswith(layer)}
    assert shapes == {
        f"{layer}.experts.base_layer.lora_A.weight": (E * r, H),
        f"{layer}.experts.base_layer.lora_B.weight": (2 * F, r * E),
        f"{layer}.experts.lora_A.weight": (E * r, F),
        f"{layer}.experts.lora_B.weight": (H, r * E),
        f"{layer}.gate.lora_A.weight": (r, H),
        f"{layer}.gate.lora_B.weight": (E, r),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {
            "rank_pattern": {r"layers\.1\.mlp\.shared_experts\.down_proj": 3},
            "alpha_pattern": {"shared_experts.up_proj": 9, "mlp.experts": 7},
        },
        {"targets": ["router", "experts.down"], "expert_rank": "r/K"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_settings_keep_their_effect(tmp_path, settings):
    """On a family whose shared experts PEFT takes for routed ones (PEFT #3711)."""
    tuned = adapted(models.deepseek_v3(), **({"targets": SHARED} | settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    export_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    loaded = read(tmp_path / "plain", models.deepseek_v3)
    torch.testing.assert_close(logits(loaded, BATCH), logits(tuned, BATCH), rtol=1e-4, atol=1e-5)


def test_dropout_goes_where_peft_has_none_and_says_so(tmp_path, warned):
    for build, kept in ((models.qwen2_moe, 0.1), (models.deepseek_v3, 0)):
        assert not warned
        adapted(build(), targets=["shared_experts"], lora_dropout=0.1).save_pretrained(tmp_path / build.__name__)
        export_plain_lora(tmp_path / build.__name__, tmp_path / "plain")
        assert settings_of(tmp_path / "plain")["lora_dropout"] == kept
    assert "on a dense base" in warned[0] and "lora_dropout=0.1 is 0 in the export" in warned[1]


def test_what_peft_cannot_have_on_parameters_is_refused(tmp_path):
    adapted(models.deepseek_v3(), targets=["shared_experts"], use_dora=True).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        OrdMoEModelError, match="without ordmoe_peft: lora.ParamWrapper does not work with use_dora=True"
    ):
        export_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_several_adapters_by_name(tmp_path, warned):
    tuned, wanted = adapted(models.qwen3_moe()), {}
    for name in ("default", "other"):
        if name == "other":
            tuned.add_adapter("other", tuned.peft_config["default"])
            tuned.set_adapter("other")
            models.randomize_adapter(tuned, seed=5)
        wanted[name] = logits(tuned, BATCH)
    tuned.set_adapter("default")
    wanted["default"] = logits(tuned, BATCH)
    tuned.save_pretrained(tmp_path / "adapter")
    for name, adapter in wanted.items():
        export_plain_lora(tmp_path / "adapter", tmp_path / name, adapter_name=name)
        torch.testing.assert_close(logits(read(tmp_path / name), BATCH), adapter, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted["default"], wanted["other"], atol=1e-3)
    assert warned == []
    export_plain_lora(tmp_path / "adapter", tmp_path / "default")
    assert "also has the adapters ['other']" in warned[0]
    with pytest.raises(OrdMoEConfigError, match=r"has the adapters \['default', 'other'\], not 'third'"):
        export_plain_lora(tmp_path / "adapter", tmp_path / "third", adapter_name="third")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(OrdMoEConfigError, match=r"has the adapters \['other'\], not 'default'"):
        export_plain_lora(tmp_path / "adapter", tmp_path / "third")


def test_an_adapter_without_a_record_needs_its_base(tmp_path):
    tuned = adapted(models.qwen3_moe())
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "ordmoe.json").unlink()
    with pytest.raises(OrdMoEConfigError, match="has no record of its base, and .* has no config.json"):
        export_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    models.qwen3_moe().save_pretrained(tmp_path / "base")
    export_plain_lora(tmp_path / "adapter", tmp_path / "plain", base=tmp_path / "base")
    torch.testing.assert_close(logits(read(tmp_path / "plain"), BATCH), logits(tuned, BATCH), rtol=1e-4, atol=1e-5)


def test_exporting_what_is_no_ordmoe_adapter(tmp_path):
    with pytest.raises(OrdMoEConfigError, match="not a saved adapter"):
        export_plain_lora(tmp_path, tmp_path / "out")
    adapted(models.qwen3_moe()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(OrdMoEConfigError, match="adapter holds README.md"):
        export_plain_lora(tmp_path / "adapter", tmp_path / "adapter")
    export_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    with pytest.raises(OrdMoEConfigError, match="LORA, not an OrdMoE one"):
        export_plain_lora(tmp_path / "plain", tmp_path / "again")
