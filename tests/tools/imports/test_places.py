"""Which weight of a base a name in an adapter's file stands for."""

import pytest

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools.imports.places import Meaning, Places, split_key
from tests import models


def test_names_of_the_base_and_of_its_checkpoints():
    places = Places(models.mixtral())
    experts, old = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe"
    for name, meaning in {
        experts: Meaning(experts, is_inner=False),
        f"{experts}.base_layer": Meaning(experts, is_inner=True),
        f"{experts}.2.gate_proj": Meaning(experts, 2, "gate"),
        f"{old}.experts.1.w2": Meaning(experts, 1, "down"),
        f"{old}.gate": Meaning("model.layers.0.mlp.gate"),
        "model.layers.1.self_attn.q_proj": Meaning("model.layers.1.self_attn.q_proj"),
    }.items():
        assert places.meaning(name) == meaning
    for unknown in ("lm_head", f"{experts}.2.other", f"{experts}.gate_up_proj", "model.layers.9.mlp.experts"):
        with pytest.raises(OrdMoEModelError, match="which MixtralForCausalLM does not have"):
            places.meaning(unknown)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_shapes_are_what_forward_gives_and_takes(family):
    up, down = Places(getattr(models, family)()).stacks["model.layers.0.mlp.experts"]
    E, H, F = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH
    assert (up.shape, down.shape) == ((E, 2 * F, H), (E, H, F))
    assert up.is_transposed == (family == "gpt_oss")


def test_keys():
    assert split_key("base_model.model.a.b.lora_B.weight") == ("a.b", "B")
    for key in ("base_model.model.a.lora_magnitude_vector", "a.lora_A.weight", "base_model.model.a.lora_A.bias"):
        with pytest.raises(OrdMoEModelError, match="none of LoRA's two factors"):
            split_key(key)
