"""A model without weights: what an adapter is attached to on disk, and what conversions ask for shapes."""

from pathlib import Path

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ...merging.in_memory import PackedWeight
from ...quantization.storage import is_packed


def empty_model(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model in `folder`, of the class that its checkpoint names, with parameters that take no memory.

    They and the buffers are zeros on the CPU rather than nothing on `meta`: PEFT would send the adapter's factors there
    after them, and attaching an adapter tries each router out.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            model = architecture(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _weightless(parameter))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _weightless(buffer).data)
    return model


def _weightless(parameter: torch.Tensor) -> nn.Parameter:
    """One number in the shape of many."""
    return nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)


class Host:
    """A model without weights that an adapter is attached to, and that takes the weights to merge into one by one.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        adapter (`str` or `Path`): folder or hub id of the adapter.
    """

    def __init__(self, model: PreTrainedModel, adapter: str | Path):
        names = {id(module): name for name, module in model.named_modules()}
        # Before PEFT wraps them: modules stay the same, their names do not.
        self.owners = {
            f"{names[id(module)]}.{attribute}": (module, attribute)
            for module in model.modules()
            for attribute, _ in module.named_parameters(recurse=False)
        }
        # The factors stay pages of the adapter's file where they are in float32.
        PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        self.adapted: list[tuple[LoraLayer, list[str]]] = []
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                owner = layer.get_base_layer()
                is_one = isinstance(layer, ParamWrapper)
                attributes = [layer.parameter_name] if is_one else [name for name, _ in owner.named_parameters()]
                self.adapted.append((layer, [f"{names[id(owner)]}.{attribute}" for attribute in attributes]))

    def put(self, name: str, value: torch.Tensor) -> None:
        """Make `value` the parameter `name`."""
        owner, attribute = self.owners[name]
        setattr(owner, attribute, value if is_packed(value) else nn.Parameter(value, requires_grad=False))

    def take(self, name: str) -> torch.Tensor:
        """The parameter `name`, which has no content afterwards."""
        owner, attribute = self.owners[name]
        value = getattr(owner, attribute)
        setattr(owner, attribute, _weightless(value))
        return value if is_packed(value) else value.data

    def packed_weight(self, name: str) -> PackedWeight | None:
        """The packed weight that was put in the place of the parameter `name`, if it is one."""
        owner, attribute = self.owners[name]
        if not is_packed(getattr(owner, attribute)):
            return None
        layer = next((layer for layer, names in self.adapted if name in names), None)
        return PackedWeight(name, owner, attribute, layer, [] if layer is None else list(layer.lora_A))
