"""The whole plan, and what it suggests."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.planning.plan import PlanSettings, plan_memory, suggest
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
        ({"num_tiers": 4}, [1, 2, 3, 4], 8),
        ({"num_tiers": 4, "objective": "logistic"}, [1, 4], 4),
        ({"num_tiers": 4, "tier_passes": "sequential"}, [1, 2, 3, 4], 2),
    ],
)
def test_rows_of_a_forward(settings, tiers, rows):
    settings = PlanSettings(**(SMALL | settings))
    assert settings.tiers_run() == tiers
    assert settings.rows == rows


def test_suggestions_come_in_order_and_stop_where_it_fits():
    config = models.qwen3_moe(vocab_size=512).config
    settings = PlanSettings(gradient_checkpointing=False, **(SMALL | {"sequence_length": 1024, "r": 16}))
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


def test_more_tiers_than_experts():
    with pytest.raises(OrdMoEConfigError, match="num_tiers=5 does not fit"):
        plan_memory(models.qwen3_moe().config, PlanSettings(num_tiers=5))


def test_roles_that_the_model_does_not_have():
    with pytest.raises(OrdMoEModelError, match="has nothing of that role"):
        plan_memory(models.qwen3_moe().config, PlanSettings(targets=("shared_experts",)))
