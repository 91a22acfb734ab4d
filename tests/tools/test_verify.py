"""Deviations are those of each tier; what is not finite is never within tolerance."""

import copy
import math

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.probes import make_probes
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools.verify import deviation_table, replay_probes
from tests import models


@pytest.fixture(scope="module")
def subject():
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, num_tiers=2))
    models.randomize_adapter(model)
    return model, {"probes": make_probes(model, "default")}


def test_deviations_are_those_of_each_tier(subject):
    model, record = subject
    changed = copy.deepcopy(record)
    changed["probes"]["log_probs"]["2"][1] = [value + 4 for value in record["probes"]["log_probs"]["2"][1]]
    first, second = replay_probes(model, changed, "x")
    assert (first.tier, first.median, first.mean, first.largest) == (1, 0, 0, 0)
    assert (second.median, second.mean, second.largest) == (0, pytest.approx(1, abs=1e-4), pytest.approx(4, abs=1e-3))
    assert second.saved - second.found == pytest.approx(1, abs=1e-4)
    assert "4.000" in deviation_table([first, second], "x").markdown()


def test_nan_is_far_from_all(subject):
    model, record = subject
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.base_model.model.lm_head.weight[:] = math.nan
    assert all(deviation.median == math.inf for deviation in replay_probes(broken, record, "x"))


def test_tokens_that_the_base_does_not_have(subject):
    smaller = get_peft_model(models.qwen3_moe(vocab_size=92), OrdMoEConfig(r=4, num_tiers=2))
    record = copy.deepcopy(subject[1])
    record["probes"]["token_ids"][2][3] = 95
    with pytest.raises(OrdMoEModelError, match="probes of x have token 95, and this model has 92 tokens"):
        replay_probes(smaller, record, "x")
