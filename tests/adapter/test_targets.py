"""What the roles stand for, and how much of a model an adapter covers."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig, coverage_report
from ordmoe_peft.errors import OrdMoEModelError
from tests import models


def test_trainable_parameters_and_coverage(model, capsys):
    tuned = get_peft_model(model, OrdMoEConfig(r=4, targets=["router", "experts"]))
    E, H, F, L = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH, models.NUM_LAYERS
    router, gate_up, down = 4 * (H + E) * L, E * 4 * (H + 2 * F) * L, E * 4 * (F + H) * L
    assert coverage_report(tuned).rows == [
        ("router", L, L, router),
        ("gate_up", L, L, gate_up),
        ("down", L, L, down),
        ("attention", 4 * L, 0, 0),
    ]
    assert tuned.get_nb_trainable_parameters()[0] == router + gate_up + down
    tuned.print_trainable_parameters()
    assert f"trainable params: {router + gate_up + down:,}" in capsys.readouterr().out
    assert "gate_up" in str(coverage_report(tuned))


def test_shared_experts_are_a_role_of_their_own():
    tuned = get_peft_model(models.qwen2_moe(), OrdMoEConfig(r=4, targets=["shared_experts"]))
    rows = {kind: (found, adapted) for kind, found, adapted, _ in coverage_report(tuned).rows}
    assert rows["shared_experts"] == (3 * models.NUM_LAYERS, 3 * models.NUM_LAYERS)
    assert rows["router"] == (models.NUM_LAYERS, 0)


def test_a_role_that_matches_nothing(model):
    with pytest.raises(OrdMoEModelError, match=r"'shared_experts', but .* has nothing of that role.*attention"):
        get_peft_model(model, OrdMoEConfig(targets=["experts", "shared_experts"]))
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_a_role_that_matches_part_of_the_layers():
    model = models.qwen3_moe()
    model.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(OrdMoEModelError, match=r"'attention'.*in 2 layers only.*\[1\]"):
        get_peft_model(model, OrdMoEConfig(targets=["attention"]))
