"""The whole plan, and what it suggests."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoETrainer, OrdMoETrainingArguments
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.quantization.ring import Place
from ordmoe_peft.tools.plan.plan import Traces, plan_memory, tokens_at_once
from ordmoe_peft.tools.plan.settings import PlanSettings
from tests import models, text


NF4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16)
SMALL = {"r": 4, "batch_size": 2, "sequence_length": 16}


@pytest.mark.parametrize("quantization", [None, NF4], ids=["bf16", "nf4"])
def test_adapter_is_what_the_trainer_trains(quantization, tmp_path):
    """fp32 on a dense base, as PEFT has it; bf16 on a quantised one, as TRL casts it."""
    targets = ("router", "experts", "attention")
    settings = PlanSettings(quantization=quantization, targets=targets, expert_rank="r/K", **SMALL)
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
    assert plan.base == sum(row.bytes for row in plan.weights)


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


def test_experts_in_ram_leave_two_slots_on_the_card():
    """4 layers of 8 experts of 3 matrices each: half a byte a weight, and an fp32 scale for 64 of them."""
    config = models.qwen3_moe(num_hidden_layers=4).config
    traces = Traces()
    plans = [
        plan_memory(config, PlanSettings(quantization=NF4, **SMALL).with_quantization(offload_experts=offload), traces)
        for offload in (False, True)
    ]
    resident, in_ram = plans
    assert len(traces.models) == len(traces.activations) == 1, "what differs needs no trace"
    layer = 8 * 3 * config.hidden_size * config.moe_intermediate_size * (32 + 4) // 64
    assert layer == (12288 + 1536) + (6144 + 768), "bytes and scales, up and down"
    pinned = 4 * (16384 + 2048 + 8192 + 1024)  # each rounded up to a power of two
    # All are multiples of 256, so slots have no gaps; 2 L - 4 layers are copied in a pass.
    assert vars(in_ram.in_ram) == {"host": 4 * layer, "pinned": pinned, "slots": 2 * layer, "copied": 4 * layer}
    assert resident.total - in_ram.total == 4 * layer - 2 * layer
    assert resident.in_ram is None
    assert in_ram.weights == resident.weights
    assert in_ram.activations == resident.activations


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("use_double_quant", [False, True])
@pytest.mark.parametrize(("hidden_size", "width"), [(64, 24), (52, 12)], ids=["even", "filled up to blocks"])
def test_places_and_copies_are_the_rings(hidden_size, width, use_double_quant, checkpointing, tmp_path, monkeypatch):
    """Bytes on the device, and bytes that a forward and backward copy there, once the order of layers is known."""
    sizes = {"hidden_size": hidden_size, "moe_intermediate_size": width}
    model = models.qwen3_moe(num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1, **sizes)
    model.save_pretrained(tmp_path)
    nf4 = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=use_double_quant, offload_experts=True)
    settings = PlanSettings(quantization=nf4, **SMALL)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=nf4)
    tuned = get_peft_model(loaded, settings.adapter_config()).train()
    if checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned.enable_input_require_grads()
    places, copied, fill = [], [], Place.fill

    def counted(place, stacks, device):
        fill(place, stacks, device)
        places.append(place)
        copied.append(sum(tensor.nbytes for stack in stacks for tensor in stack.in_ram()))

    monkeypatch.setattr(Place, "fill", counted)
    for _ in range(3):
        copied.clear()
        tuned(**models.text_batch(), labels=models.text_batch()["input_ids"]).loss.backward()
    in_ram = plan_memory(model.config, settings).in_ram
    assert in_ram.slots == sum(len(place.memory) for place in set(places))
    assert in_ram.copied == sum(copied)


def test_stacks_that_are_not_packed_are_not_in_ram():
    config = models.qwen3_moe(num_hidden_layers=4).config
    skipping = MoeBitsAndBytesConfig(llm_int8_skip_modules=["model.layers.0.mlp.experts"], offload_experts=True)
    plan = plan_memory(config, PlanSettings(quantization=skipping, **SMALL))
    assert plan.in_ram.copied == 2 * plan.in_ram.host // 3, "2 L - 4 of 3 layers"
    assert plan.in_ram.slots == 2 * plan.in_ram.host // 3


@pytest.mark.parametrize("sequence_length", [1, 64])
def test_the_optimizer_may_take_more_than_activations_took(sequence_length):
    """Its step comes when they are gone, so the larger of the two counts."""
    config, traces = models.qwen3_moe().config, Traces()
    settings = PlanSettings(quantization=NF4, **SMALL | {"r": 16, "sequence_length": sequence_length})
    fused, foreach = (
        plan_memory(config, replace(settings, optimizer=name), traces) for name in ("adamw_torch_fused", "adamw_torch")
    )
    assert foreach.optimizer == fused.optimizer
    assert foreach.temporaries == foreach.adapter
    assert fused.temporaries == fused.beyond_activations == 0
    assert foreach.total - fused.total == max(foreach.adapter - foreach.activations.peak, 0)
    assert bool(foreach.beyond_activations) == (sequence_length == 1)


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
