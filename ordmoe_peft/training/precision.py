"""The adapter's dtype under mixed precision in fp16, on cards that have no bf16 (T4, RTX 20)."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import logging

from ..errors import OrdMoEConfigError


logger = logging.get_logger(__name__)


def prepare_for_scaler_(model: nn.Module, accelerator: Accelerator) -> None:
    """Make `model` one that is trained right in fp16, where that is asked for: with a gradient scaler, in fp32 weights.

    On a base in 4 bits TRL casts the adapter to bf16, and AdamW's states are in its dtype. That is what makes
    Qwen3-30B-A3B fit into 24 GB: in fp32 the adapter, its gradients and the states take 4.7 GiB more (r 16, routers and
    experts). A scaler needs fp32 all the same: torch unscales no gradients in bf16 on CUDA (as of 2.11,
    `aten/src/ATen/native/cuda/AmpKernels.cu`), and none in fp16 anywhere.

    Raises:
        [`OrdMoEConfigError`]: fp16 is asked for and accelerate has no scaler for this device, and mixes nothing.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        return  # with scalers of their own
    if accelerator.mixed_precision != "fp16":
        if model.dtype == torch.float16:
            logger.warning(
                "The base's weights are in float16, and without fp16=True no scaler keeps small gradients from "
                "becoming 0 on their way through it. Set fp16=True on a GPU, or load the base with dtype=bfloat16 or "
                "dtype=float32."
            )
        return
    if accelerator.scaler is None:
        raise OrdMoEConfigError(
            f"fp16=True has no effect on {accelerator.device.type}: accelerate scales no gradients there and mixes no "
            "precision. Set fp16=False; bf16=True works on a CPU."
        )
    narrow = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype != torch.float32]
    for weight in narrow:
        weight.data = weight.data.float()
    if narrow:
        logger.warning(
            f"fp16=True: {len(narrow)} trained weights are held in float32, since a gradient scaler takes no others."
        )
