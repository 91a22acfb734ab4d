"""What is suggested where a plan does not fit, and in which order."""

from dataclasses import replace

import torch

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.tools.plan.plan import Traces, plan_memory
from ordmoe_peft.tools.plan.settings import PlanSettings
from ordmoe_peft.tools.plan.suggestions import fewest_changes, suggest
from tests import models


SMALL = {"r": 4, "batch_size": 2, "sequence_length": 16}


def test_suggestions_come_in_order_and_stop_where_it_fits():
    config = models.qwen3_moe(vocab_size=512, num_hidden_layers=3).config
    small = SMALL | {"sequence_length": 1024, "r": 16}
    settings = PlanSettings(gradient_checkpointing=False, tier_passes="batched", **small)
    plan = plan_memory(config, settings)
    assert list(suggest(config, settings, plan, limit=plan.total)) == []

    ways = list(suggest(config, settings, plan, limit=0))
    options = [way.options for way in ways]
    expected = ["--load_in_4bit", "--gradient_checkpointing", "--tier_passes", "--per_device", "--optim"]
    expected += ["--offload_experts true"]
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


def test_fewest_changes():
    """None where it fits; then the first that suffices alone; then pairs; and nothing where all are too few."""
    config = models.qwen3_moe(vocab_size=512, num_hidden_layers=6, moe_intermediate_size=256).config
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
    settings = PlanSettings(quantization=nf4, r=4, batch_size=1, sequence_length=1024)
    traces = Traces()

    def total(settings):
        return plan_memory(config, settings, traces).total

    def options(limit):
        way = fewest_changes(config, settings, limit, traces)
        return None if way is None else way.options

    in_8_bits, in_ram, half, quarter = (
        total(replace(settings, optimizer="paged_adamw_8bit")),
        total(settings.with_quantization(offload_experts=True)),
        total(replace(settings, sequence_length=512)),
        total(replace(settings, sequence_length=256)),
    )
    assert options(total(settings)) == ""
    assert options(total(settings) - 1) == options(in_8_bits) == "--optim paged_adamw_8bit"
    assert quarter < half < in_ram < in_8_bits, "the test needs changes that take less and less"
    assert options(in_8_bits - 1) == options(in_ram) == "--offload_experts true"
    assert options(in_ram - 1) == options(half) == "--max_length 512"
    assert options(half - 1) == "--optim paged_adamw_8bit --max_length 512"
    both = total(replace(settings, optimizer="paged_adamw_8bit", sequence_length=256))
    everything = replace(settings, optimizer="paged_adamw_8bit", sequence_length=256)
    least = total(everything.with_quantization(offload_experts=True))
    assert options(both - 1) == "--offload_experts true --max_length 256", "the last of an option counts"
    assert options(least) == "--optim paged_adamw_8bit --offload_experts true --max_length 256"
    assert options(least - 1) is None
