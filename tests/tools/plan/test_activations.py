"""The traced step against the real one, by torch's own count of allocations."""

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import get_peft_model
from trl.trainer.utils import add_fused_lm_head

from examples.benchmarks.measuring import allocated_peak, held_at_end, profiled
from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.experts.tuning import on_gpu
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tools.plan import activations
from ordmoe_peft.tools.plan.activations import estimate_activations, step_inputs
from ordmoe_peft.tools.plan.settings import PlanSettings
from ordmoe_peft.tools.plan.weights import build_meta_model
from tests import models


NF4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16)


def adapted(model):
    return get_peft_model(model, OrdMoEConfig(r=4, num_tiers=1), low_cpu_mem_usage=model.device.type == "meta")


def step(batch_size, sequence_length, **settings):
    """Settings of supervised fine-tuning, unless said otherwise."""
    return PlanSettings(**({"num_tiers": 1, "batch_size": batch_size, "sequence_length": sequence_length} | settings))


def planned(config, settings):
    model = adapted(build_meta_model(config, torch.bfloat16, settings.quantization))
    return estimate_activations(model, settings, settings.work_sizes(loaded=0))


def share_out_evenly(experts, args):
    hidden_states, index_TK, *others = args
    return hidden_states, torch.arange(index_TK.numel()).view_as(index_TK) % experts.num_experts, *others


def measured(model, settings) -> tuple[int, int]:
    """What a step holds at the end of the forward, and the most that it holds, with tokens as the plan takes them."""
    tuned = adapted(model).train()
    for layer in MoEModel.of(tuned).layers:
        layer.experts.register_forward_pre_hook(share_out_evenly)
    add_fused_lm_head(tuned.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    if settings.gradient_checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned.enable_input_require_grads()
    inputs = step_inputs(model.config, settings)
    made = {name: make() for name, make in inputs.items() if callable(make)}  # pixels, which the plan counts
    inputs |= made

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return tuned(**inputs, fused_lm_head=True).loss

    forward().backward()  # gradients exist from here on
    loss, profiler = profiled(forward)
    kept = held_at_end(profiler)
    del loss
    _, profiler = profiled(lambda: forward().backward())
    at_hand = sum(pixels.nbytes for pixels in made.values())
    return at_hand + kept, at_hand + allocated_peak(profiler)


def test_what_earlier_work_left_is_not_counted():
    """A cycle of references is freed by the collector, whenever that runs."""
    left, _ = profiled(lambda: [torch.zeros(1_000_000)])
    left.append(left)
    gc.collect()  # what outlives it waits for a full collection
    del left
    _, profiler = profiled(gc.collect)
    assert held_at_end(profiler) == 0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "gpt_oss", "deepseek_v3"])
def test_estimate_is_near_what_is_allocated(family, checkpointing):
    images = {"images_per_sample": 1, "image_tokens": 9} if family == "qwen3_vl_moe" else {}
    settings = step(2, 48, gradient_checkpointing=checkpointing, device="cpu", **images)
    model = getattr(models, family)(num_hidden_layers=5).to(torch.bfloat16)
    estimate = planned(model.config, settings)
    kept, peak = measured(model, settings)
    # Checkpointing keeps the random state of each layer, 5 KB, which is much for so small a model and nothing else.
    kept -= checkpointing * 5 * torch.get_rng_state().nbytes
    assert estimate.kept == pytest.approx(kept, rel=0.02)
    assert estimate.peak == pytest.approx(peak, rel=0.02)


def test_packed_experts_are_near_what_is_allocated(tmp_path):
    settings = step(2, 48, gradient_checkpointing=False, device="cpu", quantization=NF4)
    models.qwen3_moe(num_hidden_layers=4).to(torch.bfloat16).save_pretrained(tmp_path)
    model = type(models.qwen3_moe()).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=NF4)
    estimate = planned(models.qwen3_moe(num_hidden_layers=4).config, settings)
    kept, peak = measured(model, settings)
    assert estimate.kept == pytest.approx(kept, rel=0.02)
    assert estimate.peak == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["bf16", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_way_of_a_gpu_is_near_what_is_allocated(checkpointing, quantization, tmp_path, monkeypatch):
    """Run on the CPU, with blocks of 2 of the 8 experts."""
    settings = step(2, 48, gradient_checkpointing=checkpointing, device="cpu", quantization=quantization)
    build = partial(models.qwen3_moe, num_hidden_layers=4, moe_intermediate_size=256)
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    model = type(build()).from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=quantization)
    sizes = replace(on_gpu(), matrices=2 * 2 * 256 * 64 * 2)
    meta = adapted(build_meta_model(build().config, torch.bfloat16, quantization))
    estimate = estimate_activations(meta, settings, sizes)
    monkeypatch.setattr("ordmoe_peft.experts.forward.work_sizes", lambda device: sizes)
    kept, peak = measured(model, settings)
    kept -= checkpointing * 4 * torch.get_rng_state().nbytes
    assert estimate.kept == pytest.approx(kept, rel=0.02)
    assert estimate.peak == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_further_layers_take_what_layers_take(family, checkpointing):
    """What is kept grows by the same for each further layer, traced or not, also behind layers that get features."""
    images = {"images_per_sample": 1, "image_tokens": 9} if family == "qwen3_vl_moe" else {}
    settings = step(1, 16, gradient_checkpointing=checkpointing, **images)
    build = getattr(models, family)
    kept = [planned(with_layers(build().config, layers), settings).kept for layers in (4, 5, 9)]
    assert kept[2] - kept[1] == pytest.approx(4 * (kept[1] - kept[0]), rel=0.01)
    assert kept[1] - kept[0] >= 16 * build().config.get_text_config().hidden_size * 2, "at least its input"


def with_layers(config, layers):
    config.get_text_config().num_hidden_layers = layers
    return config


def test_more_rows_take_more_and_checkpointing_less():
    config = models.qwen3_moe(num_hidden_layers=6).config
    one, two = (planned(config, step(rows, 64, gradient_checkpointing=False)) for rows in (1, 2))
    assert 1.5 * one.kept < two.kept <= 2 * one.kept
    assert planned(config, step(2, 64)).kept < two.kept / 3


def test_tiers_take_rows_of_their_own_and_share_images():
    """Text of two tiers is text of two samples; images are encoded once, before what is kept."""
    two_tiers = step(2, 32, num_tiers=2, tier_passes="batched")
    two_samples = step(4, 32, num_tiers=2, tier_passes="sequential")
    text = models.qwen3_moe().config
    assert planned(text, two_tiers) == planned(text, two_samples)
    config = models.qwen3_vl_moe(vision_config={"depth": 12}).config
    of_images = [replace(settings, images_per_sample=1, image_tokens=9) for settings in (two_tiers, two_samples)]
    assert planned(config, of_images[0]).peak < planned(config, of_images[1]).peak


def test_the_head_on_cuda_takes_less_than_on_cpu():
    config = models.qwen3_moe(vocab_size=4096).config
    on_cuda, on_cpu = (planned(config, step(1, 64, device=device, quantization=NF4)) for device in ("cuda", "cpu"))
    assert on_cuda.peak < on_cpu.peak


def test_dense_experts_keep_what_autograd_keeps_of_grouped_products_where_these_are_one_kernel():
    config = models.qwen3_moe(num_experts_per_tok=4).config
    on_cpu, on_rtx, on_h100 = (
        step(2, 64, gradient_checkpointing=False, **changes)
        for changes in ({"device": "cpu"}, {"compute_capability": 12.0}, {"compute_capability": 9.0})
    )
    kept = planned(config, on_cpu).kept
    assert planned(config, on_h100).kept > 1.2 * kept
    assert planned(config, on_rtx).kept == pytest.approx(kept, rel=0.1), "not on other cards"
    packed = {settings: planned(config, replace(settings, quantization=NF4)).kept for settings in (on_rtx, on_h100)}
    assert packed[on_rtx] == packed[on_h100] == pytest.approx(kept, rel=0.1), "nor with packed experts"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_gpu_holds_a_block_of_experts_matrices(checkpointing):
    """8 experts of 2 · 1024 x 1024 weights in the up-projection: at a time 32 in 128 MiB, so all, or one, in bf16."""
    config = models.qwen3_moe(hidden_size=1024, moe_intermediate_size=1024, num_hidden_layers=2).config
    settings = step(1, 16, gradient_checkpointing=checkpointing, quantization=NF4)
    model = build_meta_model(config, torch.bfloat16, NF4)
    all_at_once = planned(config, settings)
    one = estimate_activations(adapted(model), settings, replace(settings.work_sizes(loaded=0), matrices=4 * 2**20))
    assert all_at_once.kept == one.kept
    matrix = 2 * 1024 * 1024 * 2
    assert all_at_once.peak - one.peak == pytest.approx(7 * matrix, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("quantization", [None, NF4], ids=["bf16", "nf4"])
def test_all_experts_at_once_take_what_one_after_another_take(quantization, checkpointing, monkeypatch):
    """Where some of the 8 experts have no tokens (3 tokens of 2 each), and where loads are uneven (21)."""
    config = models.qwen3_moe().config
    shared = {"gradient_checkpointing": checkpointing, "device": "cpu", "quantization": quantization}
    both = [step(1, length, **shared) for length in (3, 21)]
    at_once = [planned(config, settings) for settings in both]
    monkeypatch.delattr(activations._OneBlock, "by_block")
    assert at_once == [planned(config, settings) for settings in both]


@pytest.mark.parametrize(
    ("family", "images", "message"),
    [
        ("qwen3_moe", {"images_per_sample": 1, "image_tokens": 4}, "needs a vision tower"),
        ("qwen3_vl_moe", {"images_per_sample": 2, "image_tokens": 9}, "take 22 tokens of a sequence of 16"),
        ("qwen3_vl_moe", {"images_per_sample": 1}, "at least one token an image"),
    ],
)
def test_images_that_cannot_be(family, images, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        planned(getattr(models, family)().config, step(1, 16, **images))
