"""An exported adapter: what plain PEFT makes of it."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.export.plain_peft import export_plain_lora
from tests import models
from tests.adapter.test_model import adapted, logits


def test_a_new_process_with_plain_peft_loads_the_exported_adapter(family, model, batch, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tuned = adapted(model)
    tuned.save_pretrained(tmp_path / "adapter")
    export_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    torch.save((batch, logits(tuned, batch)), tmp_path / "expected.pt")
    script = f"""
        import sys, torch, transformers
        from peft import PeftModel
        base = transformers.{type(model).__name__}.from_pretrained({str(tmp_path / "base")!r}).eval()
        loaded = PeftModel.from_pretrained(base, {str(tmp_path / "plain")!r})
        assert "ordmoe_peft" not in sys.modules
        assert type(loaded.peft_config["default"]).__name__ == "LoraConfig"
        batch, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=False)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_adapter_file_has_pefts_keys_shapes_and_order(tmp_path):
    from safetensors.torch import load_file

    adapted(models.qwen3_moe()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
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


def test_exporting_what_is_no_ordmoe_adapter(tmp_path):
    with pytest.raises(OrdMoEConfigError, match="not a saved adapter"):
        export_plain_lora(tmp_path, tmp_path / "out")
    adapted(models.qwen3_moe()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(OrdMoEConfigError, match="own folder"):
        export_plain_lora(tmp_path / "adapter", tmp_path / "adapter")
    export_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    with pytest.raises(OrdMoEConfigError, match="LORA adapter, not an OrdMoE one"):
        export_plain_lora(tmp_path / "plain", tmp_path / "again")
    assert "num_tiers" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
