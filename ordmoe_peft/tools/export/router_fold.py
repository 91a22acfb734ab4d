"""Routers with the adapter's update in them, as a file of their own: for servers that take no LoRA on routers."""

import torch
from transformers import PreTrainedModel

from ...errors import OrdMoEModelError
from ...experts.expert_lora import check_finite
from ...moe_model import MoEModel
from ..lora_factors import Factors
from ..merge_on_disk.checkpoint import Checkpoint
from ..merge_on_disk.parameter_sources import find_sources


DENSE = (torch.float32, torch.bfloat16, torch.float16)


def folded_routers(
    skeleton: PreTrainedModel, checkpoint: Checkpoint, routers: dict[str, Factors]
) -> dict[str, torch.Tensor]:
    """The routers' matrices of a checkpoint with their updates added, under the checkpoint's own names and dtypes.

    Only tensors that make routers are read. Sums are in float32 and rounded once.

    Args:
        skeleton ([`~transformers.PreTrainedModel`]): the base on the meta device, without an adapter.
        checkpoint ([`Checkpoint`]): where the base's tensors are.
        routers (`dict[str, Factors]`): name of a router's matrix in the model → its update.

    Raises:
        [`OrdMoEModelError`]: the checkpoint lacks a router, has it in another form than floating-point numbers of 16
            or 32 bits, or the sum is not finite.
    """
    shapes = {tuple(layer.router_weight.shape) for layer in MoEModel.of(skeleton).layers if layer.router is not None}
    candidates = {name: tensor for name, tensor in checkpoint.tensors.items() if tuple(tensor.shape) in shapes}
    sources = find_sources(skeleton, candidates, None)
    patched: dict[str, torch.Tensor] = {}
    for name, factors in routers.items():
        if name not in sources:
            raise OrdMoEModelError(f"{checkpoint.folder} has no tensor for the router {name}. Give the adapter's base.")
        parameters = sources[name].to_parameters(checkpoint.read(sources[name].names))
        weight_EI = parameters[name]
        if weight_EI.dtype not in DENSE:
            raise OrdMoEModelError(f"{name} is of dtype {weight_EI.dtype} in {checkpoint.folder}. Give a dense base.")
        parameters[name] = (weight_EI.float() + factors.delta()[0]).to(weight_EI.dtype)
        check_finite(parameters[name], name, ["the adapter"])
        patched |= sources[name].to_tensors(parameters)
    return {name: tensor.contiguous() for name, tensor in patched.items()}
