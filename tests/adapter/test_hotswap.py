"""Another adapter in the place of one: what is computed is the new one's, and nothing else changes."""

import pytest
import torch
from peft import PeftModel

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.adapter.hotswap import hotswap_adapter
from ordmoe_peft.errors import OrdMoEConfigError
from tests import models
from tests.adapter.test_model import EVERYTHING, adapted, logits


PARAMETERS = ["router", "experts"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"r": 3}, {"r": 9, "lora_alpha": 5, "use_rslora": True}, {"targets": PARAMETERS}, {"num_tiers": 4}],
    ids=["same rank", "smaller", "larger", "fewer linears", "more tiers"],
)
def test_the_new_adapter_is_computed(tmp_path, settings):
    other, batch = adapted(models.qwen3_moe(), seed=5, **settings), models.text_batch()
    other.save_pretrained(tmp_path)
    tuned = adapted(models.qwen3_moe())
    tuned.add_adapter("second", OrdMoEConfig(r=2, targets=EVERYTHING))
    second = [weight.clone() for name, weight in tuned.named_parameters() if ".second." in name]
    hotswap_adapter(tuned, tmp_path)
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path).eval()
    for tier in (1, 3):
        with tier_routing(tuned, tier), tier_routing(loaded, tier):
            assert torch.equal(logits(tuned, batch), logits(loaded, batch))
    assert (list(tuned.peft_config), tuned.active_adapters, tuned.active_adapter) == (
        ["second", "default"],
        ["default"],
        "default",
    )
    assert not any("incoming" in name for name, _ in tuned.named_parameters())
    assert not any(weight.requires_grad for name, weight in tuned.named_parameters() if ".default." in name)
    kept = [weight for name, weight in tuned.named_parameters() if ".second." in name]
    assert all(torch.equal(one, other) for one, other in zip(second, kept, strict=True))
    tuned.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path / "again").eval()
    assert torch.equal(logits(again, batch), logits(tuned, batch))


def test_an_adapter_that_is_not_active_can_go(tmp_path):
    adapted(models.qwen3_moe(), seed=5).save_pretrained(tmp_path)
    tuned, batch = adapted(models.qwen3_moe()), models.text_batch()
    tuned.add_adapter("second", OrdMoEConfig(r=2, targets=EVERYTHING))
    wanted = logits(tuned, batch)
    hotswap_adapter(tuned, tmp_path, "second")
    assert torch.equal(logits(tuned, batch), wanted)
    tuned.set_adapter("second")
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path).eval()
    assert torch.equal(logits(tuned, batch), logits(loaded, batch))


def test_what_cannot_be_swapped_leaves_the_adapter(tmp_path):
    tuned, batch = adapted(models.qwen3_moe()), models.text_batch()
    wanted = logits(tuned, batch)
    adapted(models.qwen3_moe(), targets=["experts"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must target the same set of parameters"):
        hotswap_adapter(tuned, tmp_path)
    with pytest.raises(OrdMoEConfigError, match=r"no adapter 'other' to replace, only \['default'\]"):
        hotswap_adapter(tuned, tmp_path, "other")
    adapted(models.qwen3_moe(), modules_to_save=["lm_head"]).save_pretrained(tmp_path / "whole")
    with pytest.raises(OrdMoEConfigError, match=r"whole' has modules_to_save=\['lm_head'\].*not swapped"):
        hotswap_adapter(tuned, tmp_path / "whole")
    assert list(tuned.peft_config) == ["default"]
    assert torch.equal(logits(tuned, batch), wanted)
    tuned.merge_adapter()
    with pytest.raises(OrdMoEConfigError, match="is merged"):
        hotswap_adapter(tuned, tmp_path)
