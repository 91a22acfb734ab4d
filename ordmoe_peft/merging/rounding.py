"""The weights that a 4-bit load would give, as numbers."""

import torch
from transformers import PreTrainedModel

from ..quantization.config import MoeBitsAndBytesConfig
from ..quantization.quantizer import MoeBnb4BitHfQuantizer
from .in_memory import unpacker


class Rounding:
    """Rounds weights as loading with a recipe would: the same weights, by the same operations, and unpacked again.

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

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The rounded `weight`, in its own dtype; `weight` itself holds it afterwards."""
        packed = self.quantizer.get_quantize_ops().convert({name: weight}, model=self.model)[name]
        count, unpack = unpacker(packed)
        for index, rows in enumerate(weight.view(count, *weight.shape[-2:])):
            rows.copy_(unpack(index))
        return weight
