"""Models whose `device_map` keeps layers on disk: right, or refused by name when the adapter is attached."""

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen3MoeForCausalLM

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.errors import OrdMoEModelError
from tests import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    models.qwen3_moe().save_pretrained(folder)
    return folder


@pytest.fixture
def offloaded(folder, tmp_path):
    """The second of three layers is on disk."""
    places = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.2")
    device_map = {f"model.{place}": "cpu" for place in places} | {"lm_head": "cpu", "model.layers.1": "disk"}
    return Qwen3MoeForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.text_batch()).logits


def adapted(model, targets):
    torch.manual_seed(1)
    tuned = get_peft_model(model, OrdMoEConfig(r=4, targets=targets))
    models.randomize_adapter(tuned)
    return tuned


def test_routers_are_adapted_in_all_layers(offloaded):
    model = models.qwen3_moe()
    plain, wanted = logits(model), logits(adapted(model, ["router"]))
    assert not torch.allclose(wanted, plain, atol=1e-3)
    tuned = adapted(offloaded, ["router"])
    assert torch.equal(logits(tuned), wanted)
    assert torch.equal(logits(tuned.unload()), plain)


@pytest.mark.parametrize("tier_weights", ["router", "match"])
def test_tiers_hold_without_an_adapter(offloaded, tier_weights):
    model = models.qwen3_moe()
    with tier_routing(model, 3, tier_weights=tier_weights):
        wanted = logits(model)
    with tier_routing(offloaded, 3, tier_weights=tier_weights):
        assert torch.equal(logits(offloaded), wanted)


@pytest.mark.parametrize(("role", "name"), [("experts", r"\.layers\.1\.mlp\.experts"), ("attention", r"q_proj")])
def test_what_lora_would_not_reach_is_refused_by_name(offloaded, role, name):
    before = logits(offloaded)
    with pytest.raises(OrdMoEModelError, match=rf"device_map keeps model.*{name}.*leave their roles out"):
        get_peft_model(offloaded, OrdMoEConfig(r=4, targets=["router", role]))
    assert torch.equal(logits(offloaded), before)
    assert not any("lora_" in parameter for parameter, _ in offloaded.named_parameters())
