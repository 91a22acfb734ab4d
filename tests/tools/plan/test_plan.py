"""The whole plan, and what it suggests."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.tools.plan.plan import plan_memory, tokens_at_once
from ordmoe_peft.tools.plan.settings import PlanSettings
from tests import models, text


NF4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16)
SMALL = {"r": 4, "batch_size": 2, "sequence_length": 16}


@pytest.mark.parametrize("quantization", [None, NF4], ids=["bf16", "nf4"])
def test_adapter_is_what_the_trainer_trains(quantization, tmp_path):
    """fp32 on a dense base, as PEFT has it; bf16 on a quantised one, as TRL casts it."""
    settings = PlanSettings(quantization=quantization, targets=("router", "experts", "attention"), **SMALL)
    model = models.qwen3_moe().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=quantization)
    trainer = OrdMoETrainer(
        get_peft_model(loaded, settings.adapter_config()),
        args=OrdMoETrainingArguments(tmp_path, use_cpu=True, report_to="none"),
        train_dataset=text.conversations(),
        processing_class=text.tokenizer(),
    )
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    plan = plan_memory(model.config, settings)
    assert {parameter.dtype for parameter in trained} == {torch.float32 if quantization is None else torch.bfloat16}
    assert plan.adapter == plan.gradients == sum(parameter.nbytes for parameter in trained)
    assert plan.trainable == sum(parameter.numel() for parameter in trained)
    parts = (plan.base, plan.adapter, plan.gradients, plan.optimizer, plan.activations.peak)
    assert plan.total == sum(parts) == plan.to_dict()["total"]
    assert all(parts)


def test_a_gradient_scaler_needs_an_adapter_in_fp32():
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float16)
    settings = PlanSettings(dtype=torch.float16, quantization=nf4, **SMALL)
    config = models.qwen3_moe().config
    unscaled, scaled = (plan_memory(config, replace(settings, autocast=dtype)) for dtype in (None, torch.float16))
    assert scaled.adapter == 2 * unscaled.adapter == 4 * scaled.trainable


@pytest.mark.parametrize("quantization", [None, {}], ids=["dense", "nf4"])
def test_weights_are_counted_in_their_dtype(quantization):
    config = models.qwen3_moe().config
    plans = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        nf4 = None if quantization is None else MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=dtype)
        plans[dtype] = plan_memory(config, PlanSettings(dtype=dtype, quantization=nf4, **SMALL))
    assert plans[torch.float16].base == plans[torch.bfloat16].base < plans[torch.float32].base
    assert plans[torch.bfloat16].activations.peak < plans[torch.float32].activations.peak
    half = plans[torch.float16].activations.peak
    assert half == pytest.approx(plans[torch.bfloat16].activations.peak, rel=0.2)


def test_auto_decides_by_the_rule_of_the_trainer():
    """A pass of 32 tokens takes p bytes, so a batch of n tokens on two tiers takes 2 p n / 32: at most 80 % of what
    gradients and optimizer states leave.
    """
    config = models.qwen3_moe().config
    settings = PlanSettings(**SMALL)
    plan = plan_memory(config, settings)
    states = plan.base + plan.adapter + plan.gradients + plan.optimizer
    assert tokens_at_once(plan, settings, states + 5 * plan.activations.peak) == 64
    assert tokens_at_once(plan, settings, states) == tokens_at_once(plan, settings, plan.base) == 0
    assert tokens_at_once(plan, replace(settings, tier_passes="batched"), plan.total) is None
    assert tokens_at_once(plan, replace(settings, num_tiers=1), plan.total) is None
    one_after_another = plan_memory(config, replace(settings, tier_passes="sequential"))
    assert plan.total == one_after_another.total
    assert plan.activations.peak < plan_memory(config, replace(settings, tier_passes="batched")).activations.peak


def test_more_tiers_than_experts():
    with pytest.raises(OrdMoEConfigError, match="num_tiers=5 does not fit"):
        plan_memory(models.qwen3_moe().config, PlanSettings(num_tiers=5))


def test_roles_that_the_model_does_not_have():
    with pytest.raises(OrdMoEModelError, match="has nothing of that role"):
        plan_memory(models.qwen3_moe().config, PlanSettings(targets=("shared_experts",)))
