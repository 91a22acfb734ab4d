"""What the trainer can do with the devices, processes and dtypes that it is given."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from ..adapter.config import OrdMoEConfig
from ..errors import OrdMoEConfigError
from ..merging.in_memory import has_packed_weights
from ..quantization.offloaded import is_in_ram
from ..quantization.storage import is_packed


def check_placement(accelerator: Accelerator, num_devices: int, writes_responses: bool) -> None:
    """See that training works as accelerate is set up to share the model out.

    Args:
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        num_devices (`int`): devices that this process trains on, `args.n_gpu`.
        writes_responses (`bool`): whether tiers generate responses.

    Raises:
        [`OrdMoEConfigError`]: it does not.
    """
    if num_devices > 1:
        raise OrdMoEConfigError(
            f"This process sees {num_devices} GPUs, which Trainer would share out by nn.DataParallel, whose replicas "
            "do not know their tiers. Start one process for each (`accelerate launch --num_processes "
            f"{num_devices} ...`), or show one (`CUDA_VISIBLE_DEVICES=0`)."
        )
    sharding = _sharding(accelerator)
    if sharding == "FSDP1":
        raise OrdMoEConfigError(
            "FSDP1 (fsdp_version: 1) flattens weights, so tiers do not find the routers: set fsdp_version: 2."
        )
    if sharding is not None and writes_responses:
        raise OrdMoEConfigError(
            f"responses='generated' does not work with {sharding}: each process holds a part of every weight, and a "
            "process whose responses end early would leave the others waiting. Use DDP or ZeRO-2, or set "
            "responses='reference'."
        )


def check_experts_in_ram(model: nn.Module, accelerator: Accelerator) -> None:
    """See that a model whose experts stay in RAM is trained by one process.

    Raises:
        [`OrdMoEConfigError`]: something shares the model or the data out over processes.
    """
    kind = accelerator.state.distributed_type
    is_shared = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) or accelerator.num_processes > 1
    if is_shared and any(map(is_in_ram, model.parameters())):
        name = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}.get(kind, "DDP")
        raise OrdMoEConfigError(
            f"offload_experts=True is not supported with {name} ({accelerator.num_processes} processes): each would "
            "need all experts in RAM, and none of this is tested. Train in one process, or set offload_experts=False."
        )


def check_selected_experts(config: OrdMoEConfig, args: TrainingArguments, accelerator: Accelerator) -> None:
    """See that nothing moves the factors of experts that `expert_selection` leaves out.

    Optimizers with states in 8 bits do; see [`expert_selection`](../adapter/expert_selection.py).

    Raises:
        [`OrdMoEConfigError`]: such an optimizer steps on parts of weights, which are not cleared after it.
    """
    is_shared = accelerator.state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if config.expert_selection is not None and is_shared and "8bit" in args.optim:
        raise OrdMoEConfigError(
            f"optim={str(args.optim)!r} moves weights whose gradients are zero, so with FSDP or DeepSpeed the experts "
            "that expert_selection leaves out would be trained, too. Set optim='adamw_torch', or use DDP."
        )


def _sharding(accelerator: Accelerator) -> str | None:
    """What shares every weight out over processes, if anything does."""
    state = accelerator.state
    if state.distributed_type == DistributedType.FSDP:
        return f"FSDP{state.fsdp_plugin.fsdp_version}"
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3"
    return None


def check_recomputed(args: TrainingArguments) -> None:
    """See that under DeepSpeed ZeRO-3 each layer's forward is run again in backward.

    Without, frozen weights that backward needs are empty from the second step on (DeepSpeed 0.19.8).

    Raises:
        [`OrdMoEConfigError`]: it is not.
    """
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and not args.gradient_checkpointing:
        raise OrdMoEConfigError(
            "gradient_checkpointing=False does not work with DeepSpeed ZeRO-3, which empties frozen weights that "
            "backward needs. Set gradient_checkpointing=True, or use ZeRO-2 or FSDP2."
        )


def check_precision(model: nn.Module, args: TrainingArguments) -> None:
    """See that mixed precision is in the dtype that layers in 4 bits give out, which is that of the weights.

    Autocast takes one 16-bit dtype and ends with "Unexpected floating ScalarType" where another meets it. DeepSpeed
    casts the model instead, and with it bytes that are presented as floats.

    Raises:
        [`OrdMoEConfigError`]: it is in the other 16-bit dtype, or DeepSpeed would cast bytes.
    """
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    stored = {weight.dtype for weight in model.parameters() if is_packed(weight) and weight.is_floating_point()}
    if args.deepspeed_plugin is not None and mixed is not None and stored - {mixed}:
        raise OrdMoEConfigError(
            f"DeepSpeed casts the model to {mixed}, which would destroy 4-bit weights whose bytes are presented as "
            f"{sorted(map(str, stored))}. Load the base with bnb_4bit_quant_storage='uint8'."
        )
    if has_packed_weights(model) and {mixed, model.dtype} == {torch.bfloat16, torch.float16}:
        option, instead = ("bf16", "fp16") if args.bf16 else ("fp16", "bf16")
        raise OrdMoEConfigError(
            f"The base is in 4 bits of {model.dtype} weights, and {option}=True mixes in the other 16-bit dtype, which "
            f"autocast does not take. Set {option}=False, or {instead}=True, or load the base with dtype={mixed}."
        )
