"""The packed weights that a 4-bit load would give."""

import torch
from bitsandbytes.nn import Params4bit
from transformers import PreTrainedModel

from ...quantization.config import MoeBitsAndBytesConfig
from ...quantization.quantizer import MoeBnb4BitHfQuantizer


class Packing:
    """Packs weights as loading with a recipe would: the same weights, by the same operations.

    Args:
        model ([`~transformers.PreTrainedModel`]): a model without content, of the base's shapes; it is changed.
        config ([`MoeBitsAndBytesConfig`]): the recipe.
    """

    def __init__(self, model: PreTrainedModel, config: MoeBitsAndBytesConfig):
        self.model = model
        self.quantizer = MoeBnb4BitHfQuantizer(config, pre_quantized=False)
        self.quantizer.preprocess_model(model=model, device_map=None)
        parameters = [name for name, _ in model.named_parameters()]
        self.names = {name for name in parameters if self.quantizer.param_needs_quantization(model, name)}

    @property
    def config(self) -> MoeBitsAndBytesConfig:
        """The recipe, with all that it leaves unpacked."""
        return self.quantizer.quantization_config

    def __call__(self, name: str, weight: torch.Tensor) -> Params4bit:
        """`weight`, which is the parameter `name`, packed."""
        return self.quantizer.get_quantize_ops().convert({name: weight}, model=self.model)[name]
