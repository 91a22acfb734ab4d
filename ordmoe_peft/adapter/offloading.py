"""Models whose weights accelerate keeps in RAM or on disk, and brings to the device for a module's forward."""

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device, set_module_tensor_to_device
from torch import nn

from ..errors import OrdMoEModelError
from ..moe_model import MoELayer
from .targets import Target


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps weights of `module` itself elsewhere: outside of its forward they are on no device."""
    return hasattr(module, "_hf_hook") and any(p.device.type == "meta" for p in module.parameters(recurse=False))


def check_offloading(model: nn.Module, targets: list[Target]) -> None:
    """See that what is to be adapted is there; offloaded routers can be brought.

    Raises:
        [`OrdMoEModelError`]: some is offloaded.
    """
    names = {target.name.rpartition(".")[0] if target.is_parameter else target.name: target for target in targets}
    offloaded = [name for name, t in names.items() if t.role != "router" and is_offloaded(model.get_submodule(name))]
    if offloaded:
        raise OrdMoEModelError(
            f"device_map keeps {', '.join(offloaded)} in RAM or on disk, where LoRA does not reach them. Load the "
            "model in 4 bits (`MoeBitsAndBytesConfig`, with `offload_experts=True` if it is too large even so), give a "
            "device_map that puts them on a device, or leave their roles out of targets."
        )


def bring_offloaded_routers(layers: list[MoELayer]) -> None:
    """Put offloaded routers on the device that they run on, for good: they are small, and LoRA adds to their weight."""
    for layer in layers:
        for module in () if layer.router is None else layer.router.modules():
            if is_offloaded(module):
                _bring(module)


def _bring(module: nn.Module) -> None:
    with align_module_device(module), torch.no_grad():
        tensors = {name: tensor.clone() for name, tensor in module.named_parameters(recurse=False)}
    remove_hook_from_module(module)
    for name, tensor in tensors.items():
        set_module_tensor_to_device(module, name, tensor.device, value=tensor)
