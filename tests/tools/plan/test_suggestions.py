"""What is suggested where a plan does not fit, and in which order."""

from dataclasses import replace

import torch

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.tools.plan.plan import plan_memory
from ordmoe_peft.tools.plan.settings import PlanSettings
from ordmoe_peft.tools.plan.suggestions import suggest
from tests import models


SMALL = {"r": 4, "batch_size": 2, "sequence_length": 16}


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


def test_4_bits_of_fp16_weights_are_suggested_without_bf16():
    """torch's bf16 autocast refuses the outputs of such layers, in training as well."""
    config = models.qwen3_moe().config
    settings = PlanSettings(dtype=torch.float16, **SMALL)
    way = next(suggest(config, settings, plan_memory(config, settings), limit=0))
    assert way.options == "--load_in_4bit true --bf16 false"
    assert way.settings.autocast is None
