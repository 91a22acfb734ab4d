"""Which tiers and rows settings stand for, and which settings cannot be."""

from dataclasses import replace

import pytest
import torch

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.experts.tuning import ON_CPU, on_gpu
from ordmoe_peft.tools.plan.settings import PlanSettings


SMALL = {"r": 4, "batch_size": 2, "sequence_length": 16}


@pytest.mark.parametrize(
    ("settings", "tiers", "rows"),
    [
        ({"num_tiers": 1}, [1], 2),
        ({"num_tiers": 3}, [1, 3], 4),  # the middle tier of three has advantage 0
        ({"num_tiers": 3, "rewards": (1.0, 0.9, 0.0)}, [1, 2, 3], 6),
        ({"num_tiers": 3, "advantages": "none"}, [1, 2], 4),
        ({"num_tiers": 4}, [1, 2, 3, 4], 8),
        ({"num_tiers": 4, "objective": "logistic"}, [1, 4], 4),
        ({"num_tiers": 4, "tier_passes": "sequential"}, [1, 2, 3, 4], 2),
        ({"num_tiers": 4, "tier_passes": "auto"}, [1, 2, 3, 4], 2),
    ],
)
def test_rows_of_a_forward(settings, tiers, rows):
    settings = PlanSettings(**(SMALL | {"tier_passes": "batched"} | settings))
    assert settings.tiers_run() == tiers
    assert settings.rows == rows


@pytest.mark.parametrize(
    ("loaded_gib", "matrices_mib"),
    [(0, 128), (15.9, 64), (20, 32), (30, 32)],
    ids=["empty", "8 left", "4 left", "none"],
)
def test_experts_at_a_time_follow_what_the_card_has_left(loaded_gib, matrices_mib):
    loaded = int(loaded_gib * 2**30)
    assert PlanSettings(usable=23 * 2**30).work_sizes(loaded) == on_gpu(matrices_mib)
    assert PlanSettings().work_sizes(loaded) == on_gpu()
    assert PlanSettings(usable=23 * 2**30, device="cpu").work_sizes(loaded) == ON_CPU


def test_what_a_trace_does_not_depend_on():
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True)
    settings = PlanSettings(quantization=nf4)
    others = [
        settings.with_quantization(offload_experts=True),
        replace(settings, optimizer="adamw_8bit"),
        replace(settings, usable=2**30),
    ]
    assert {str(other.for_trace()) for other in others} == {str(settings.for_trace())}
    assert others[0].offload_experts
    assert not nf4.offload_experts, "what was given stays as it is"
    assert not others[0].for_trace().offload_experts
    longer = replace(settings, batch_size=3, sequence_length=7, gradient_checkpointing=False, tier_passes="batched")
    assert str(longer.for_weights()) == str(settings.for_weights()), "rows do not bear on base and adapter"
    for change in ({"r": 8}, {"sequence_length": 7}, {"compute_capability": 9.0}, {"quantization": None}):
        assert str(replace(settings, **change).for_trace()) != str(settings.for_trace())
    assert str(settings.with_quantization(bnb_4bit_use_double_quant=False).for_trace()) != str(settings.for_trace())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": -4}, "sequence_length must be at least 1, got -4"),
        ({"image_tokens": -1}, "image_tokens must not be negative, got -1"),
        ({"tier_passes": "both"}, "tier_passes must be one of .*'both'"),
        ({"optimizer": "adam"}, "optimizer must be one of .*'adam'"),
        ({"objective": "ppo"}, "objective must be one of .*'ppo'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        PlanSettings(**settings)


def test_mixed_precision_of_two_16_bit_dtypes_is_not_used():
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float16)
    settings = PlanSettings(dtype=torch.float16, quantization=nf4, batch_size=1, sequence_length=16)
    assert settings.autocast_used is None
    assert PlanSettings(dtype=torch.float16).autocast_used == torch.bfloat16, "dense layers are cast"
    assert settings.logits_bytes == 16 * 32768 * 2
