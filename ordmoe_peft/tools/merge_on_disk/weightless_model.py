"""A model without weights, which an adapter is attached to and whose shapes conversions ask for."""

from pathlib import Path

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ...merging.in_memory import BaseWeight, lora_layers
from ...moe_model import without_wrappers
from ...quantization.storage import is_packed


def meta_model(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model in `folder`, of the class that its checkpoint names, on the meta device."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return architecture(config)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


class WeightlessModel:
    """A model without weights with an adapter on it, which is given the weights to merge into one by one.

    Its weights are zeros on the CPU that take no memory, rather than on the meta device: PEFT would put the adapter's
    factors there, too, and attaching an adapter runs each router.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, on the meta device; changed in place.
        adapter (`str` or `Path`): folder or hub id of the adapter.
        known (`dict`, *optional*): weights to have from the beginning, by which the adapter knows its base.
        ignore_fingerprint (`bool`, defaults to `False`): attach it to another base, with a warning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: str | Path,
        known: dict[str, torch.Tensor] | None = None,
        ignore_fingerprint: bool = False,
    ):
        self.model = make_weightless_(model, known)
        # The factors stay pages of the adapter's file where they are in float32.
        options = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
        PeftModel.from_pretrained(model, adapter, ignore_fingerprint=ignore_fingerprint, **options)
        layers = lora_layers(model)
        self.weights: dict[str, BaseWeight] = {}
        for wrapped_name in model.state_dict():
            owner_name, _, attribute = wrapped_name.rpartition(".")
            owner = model.get_submodule(owner_name)
            layer = layers.get((owner, attribute))
            adapters = [] if layer is None else list(layer.lora_A)
            self.weights[without_wrappers(wrapped_name)] = BaseWeight([wrapped_name], owner, attribute, layer, adapters)

    @property
    def adapted(self) -> list[BaseWeight]:
        """The weights that the adapter changes."""
        return [weight for weight in self.weights.values() if weight.layer is not None]

    def put(self, name: str, value: torch.Tensor) -> None:
        """Make `value` the parameter or buffer `name`."""
        weight = self.weights[name]
        is_buffer = not isinstance(weight.value, nn.Parameter)
        parameter = value if is_buffer or is_packed(value) else nn.Parameter(value, requires_grad=False)
        setattr(weight.owner, weight.attribute, parameter)

    def take(self, name: str) -> torch.Tensor:
        """The parameter or buffer `name`, which has no content afterwards."""
        weight = self.weights[name]
        value = weight.value
        setattr(weight.owner, weight.attribute, weightless(value))
        return value if is_packed(value) else value.data


def make_weightless_(model: PreTrainedModel, known: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """Give a model on the meta device zeros on the CPU that take no memory, or what is `known`, and return it.

    What is known gets the model's dtype: PEFT rounds an adapter's factors to that of the weight they are for.
    """
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, weightless(tensor))
    for name, value in (known or {}).items():
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        value = value.to(getattr(owner, attribute).dtype)
        is_parameter = isinstance(getattr(owner, attribute), nn.Parameter)
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return model


def weightless(tensor: torch.Tensor) -> torch.Tensor:
    """One number in the shape of many."""
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(zeros, requires_grad=False) if isinstance(tensor, nn.Parameter) else zeros
