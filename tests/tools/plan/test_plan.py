"""The whole plan, and what it suggests."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.tools.plan.plan import PlanSettings, plan_memory, suggest, tokens_at_once
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


def test_suggestions_come_in_order_and_stop_where_it_fits():
    config = models.qwen3_moe(vocab_size=512, num_hidden_layers=1).config
    small = SMALL | {"sequence_length": 1024, "r": 16}
    settings = PlanSettings(gradient_checkpointing=False, tier_passes="batched", **small)
    plan = plan_memory(config, settings)
    assert list(suggest(config, settings, plan, limit=plan.total)) == []

    ways = list(suggest(config, settings, plan, limit=0))
    options = [way.options for way in ways]
    expected = ["--load_in_4bit", "--gradient_checkpointing", "--tier_passes", "--per_device", "--optim"]
    expected += ["--max_length 512", "--max_length 256", "--lora_r 8"]
    assert [
        option.startswith(prefix)
        for option, prefix in zip([o for o in options if "nested" not in o], expected, strict=True)
    ] == [True] * len(expected)
    totals = [plan.total, *(way.plan.total for way in ways)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals), "what takes no less is not suggested"
    assert ways[-1].settings.rows == 1

    enough = ways[2].plan.total
    assert [way.options for way in suggest(config, settings, plan, limit=enough)] == options[:3]


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


def test_a_suggestion_keeps_the_rest_of_the_quantisation():
    config = models.qwen3_moe(num_hidden_layers=4, moe_intermediate_size=1024).config
    quantization = MoeBitsAndBytesConfig(bnb_4bit_blocksize=128, llm_int8_skip_modules=["lm_head"])
    settings = PlanSettings(quantization=quantization, **(SMALL | {"batch_size": 1}))
    plan = plan_memory(config, settings)
    (way,) = suggest(config, settings, plan, limit=plan.total - 1)
    assert way.options == "--use_bnb_nested_quant true"
    assert way.settings.quantization.to_dict() == quantization.to_dict() | {"bnb_4bit_use_double_quant": True}
    assert not quantization.bnb_4bit_use_double_quant, "what was given stays as it is"

    stored = replace(settings, is_stored_packed=True)
    assert "nested" not in next(suggest(config, stored, plan, limit=plan.total - 1)).options


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


def test_4_bits_of_fp16_weights_are_suggested_without_bf16():
    """torch's bf16 autocast refuses the outputs of such layers, in training as well."""
    config = models.qwen3_moe().config
    settings = PlanSettings(dtype=torch.float16, **SMALL)
    way = next(suggest(config, settings, plan_memory(config, settings), limit=0))
    assert way.options == "--load_in_4bit true --bf16 false"
    assert way.settings.autocast is None


def test_auto_decides_by_the_rule_of_the_trainer():
    """A pass of 32 tokens takes p bytes, so a batch of n tokens on two tiers takes 2 p n / 32: at most half of free."""
    config = models.qwen3_moe().config
    settings = PlanSettings(**SMALL)
    plan = plan_memory(config, settings)
    a_pass = plan.gradients + plan.activations.peak
    assert tokens_at_once(plan, settings, plan.base + plan.adapter + 4 * a_pass) == 32
    assert tokens_at_once(plan, settings, plan.base) == 0
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
