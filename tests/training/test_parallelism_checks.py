"""What is refused on models that are shared out over processes. Tests on processes: `tests/distributed`."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.training.parallelism_checks import (
    check_experts_in_ram,
    check_placement,
    check_precision,
    check_recomputed,
    check_selected_experts,
)
from tests import models


def accelerator(kind: str, version: int | None = None, stage: int | None = None, processes: int = 1) -> SimpleNamespace:
    plugins = {
        "fsdp_plugin": SimpleNamespace(fsdp_version=version),
        "deepspeed_plugin": SimpleNamespace(zero_stage=stage),
    }
    state = SimpleNamespace(distributed_type=DistributedType(kind), **plugins)
    return SimpleNamespace(state=state, num_processes=processes)


def precision(mixed: str | None, deepspeed_plugin: SimpleNamespace | None = None) -> SimpleNamespace:
    return SimpleNamespace(bf16=mixed == "bf16", fp16=mixed == "fp16", deepspeed_plugin=deepspeed_plugin)


def test_responses_are_not_generated_where_weights_are_sharded():
    with pytest.raises(OrdMoEConfigError, match="responses='generated' does not work with FSDP2"):
        check_placement(accelerator("FSDP", version=2), 1, writes_responses=True)
    with pytest.raises(OrdMoEConfigError, match="does not work with DeepSpeed ZeRO-3"):
        check_placement(accelerator("DEEPSPEED", stage=3), 1, writes_responses=True)


def test_experts_that_are_not_selected_stay_where_optimizers_step_on_parts():
    some, every = (OrdMoEConfig(expert_selection=selection) for selection in ({0: [1]}, None))
    in_8_bits, in_32 = (
        TrainingArguments("out", optim=name, report_to="none") for name in ("adamw_8bit", "adamw_torch")
    )
    with pytest.raises(OrdMoEConfigError, match="moves weights whose gradients are zero, so with FSDP"):
        check_selected_experts(some, in_8_bits, accelerator("FSDP", version=2))
    check_selected_experts(every, in_8_bits, accelerator("FSDP", version=2))
    check_selected_experts(some, in_32, accelerator("DEEPSPEED", stage=2))
    check_selected_experts(some, in_8_bits, accelerator("MULTI_GPU"))


def test_fsdp1_is_refused():
    with pytest.raises(OrdMoEConfigError, match="set fsdp_version: 2"):
        check_placement(accelerator("FSDP", version=1), 1, writes_responses=False)


def test_zero3_runs_forwards_again():
    def arguments(stage: int | None, again: bool) -> SimpleNamespace:
        plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
        return SimpleNamespace(deepspeed_plugin=plugin, gradient_checkpointing=again)

    with pytest.raises(OrdMoEConfigError, match=r"ZeRO-3.*Set gradient_checkpointing=True"):
        check_recomputed(arguments(3, again=False))
    for stage, again in ((3, True), (2, False), (None, False)):
        check_recomputed(arguments(stage, again))


def test_the_others_are_not():
    for shared in (accelerator("FSDP", version=2), accelerator("DEEPSPEED", stage=3)):
        check_placement(shared, 1, writes_responses=False)
    for whole in (accelerator("NO"), accelerator("MULTI_GPU"), accelerator("DEEPSPEED", stage=2)):
        check_placement(whole, 1, writes_responses=True)


def test_several_devices_of_one_process_are_refused():
    with pytest.raises(OrdMoEConfigError, match=r"sees 2 GPUs.*accelerate launch --num_processes 2"):
        check_placement(accelerator("NO"), 2, writes_responses=False)


@pytest.mark.parametrize(
    ("shared", "name"),
    [
        (accelerator("FSDP", version=2), "FSDP"),
        (accelerator("DEEPSPEED", stage=2), "DeepSpeed"),
        (accelerator("MULTI_GPU", processes=2), "DDP"),
        (accelerator("MULTI_CPU", processes=2), "DDP"),
    ],
    ids=["FSDP", "DeepSpeed", "two GPUs", "two CPU processes"],
)
def test_experts_in_ram_are_trained_by_one_process(shared, name):
    in_ram, on_device = (
        quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig(offload_experts=offloads))
        for offloads in (True, False)
    )
    with pytest.raises(OrdMoEConfigError, match=f"offload_experts=True is not supported with {name}"):
        check_experts_in_ram(in_ram, shared)
    check_experts_in_ram(on_device, shared)
    for alone in (accelerator("NO"), accelerator("MULTI_GPU")):
        check_experts_in_ram(in_ram, alone)


@pytest.mark.parametrize(("weights", "mixed"), [(torch.float16, "bf16"), (torch.bfloat16, "fp16")])
def test_4_bits_of_one_16_bit_dtype_are_not_trained_under_the_other(weights, mixed):
    model = quantize_experts_(models.qwen3_moe().to(weights), MoeBitsAndBytesConfig())
    with pytest.raises(OrdMoEConfigError, match=rf"4 bits of {weights} weights.*Set {mixed}=False"):
        check_precision(model, precision(mixed))
    check_precision(model, precision("bf16" if weights == torch.bfloat16 else "fp16"))
    check_precision(models.qwen3_moe().to(weights), precision(mixed))


def test_deepspeed_does_not_cast_bytes():
    def packed_as(storage: str) -> torch.nn.Module:
        return quantize_experts_(models.qwen3_moe().bfloat16(), MoeBitsAndBytesConfig(bnb_4bit_quant_storage=storage))

    zero2 = SimpleNamespace(zero_stage=2)
    with pytest.raises(OrdMoEConfigError, match=r"presented as \['torch.float32'\].*bnb_4bit_quant_storage='uint8'"):
        check_precision(packed_as("float32"), precision("bf16", zero2))
    check_precision(packed_as("float32"), precision("bf16"))
    for storage in ("bfloat16", "uint8"):
        check_precision(packed_as(storage), precision("bf16", zero2))
    check_precision(packed_as("float32"), precision(None, zero2))
