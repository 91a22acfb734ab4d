"""A model as it would be loaded, without its weights.

The model is built on the meta device and goes through the loader's own steps, so what is quantised, and how, is the
loader's decision: [`~ordmoe_peft.quantization_census`] of it is that of the loaded model, to the byte.
"""

import copy
from collections.abc import Iterator

import torch
import transformers
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import local_torch_dtype

from ..._compat import dtypes_kept, quantize_linear_weight_
from ...errors import OrdMoEModelError
from ...moe_model import MoEModel
from ...quantization.config import MoeBitsAndBytesConfig
from ...quantization.quantizer import MoeBnb4BitHfQuantizer


def build_meta_model(
    config: PretrainedConfig, dtype: torch.dtype, quantization: MoeBitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The model that `from_pretrained` would give for `config`, on the meta device.

    Args:
        config ([`~transformers.PretrainedConfig`]): its configuration.
        dtype (`torch.dtype`): that of unquantised weights.
        quantization ([`MoeBitsAndBytesConfig`], *optional*): how it is quantised while it is loaded.

    Raises:
        [`OrdMoEModelError`]: it has no MoE layers, or they cannot be counted or quantised.
    """
    with torch.device("meta"), local_torch_dtype(dtype):
        model = model_class(config)(copy.deepcopy(config))  # loading writes into it
    MoEModel.of(model).check_fused("`ordmoe plan`")
    for name, kept in dtypes_kept(model, dtype).items():
        tensor = model.get_parameter_or_buffer(name)
        tensor.data = tensor.data.to(kept)
    if quantization is not None:
        _quantise(model, dtype, quantization)
    return model.eval()


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that `config` names as its architecture, else the causal language model of its kind.

    Raises:
        [`OrdMoEModelError`]: transformers has neither.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    known = named or next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if known is None:
        raise OrdMoEModelError(
            f"The configuration is of {config.model_type!r} with architectures={config.architectures}, for which "
            "transformers has no language model."
        )
    return known


def _quantise(model: PreTrainedModel, dtype: torch.dtype, config: MoeBitsAndBytesConfig) -> None:
    """Take `model` through what `from_pretrained` does to it, by the loader's own functions."""
    quantizer = MoeBnb4BitHfQuantizer(config, pre_quantized=False)
    dense = {name: parameter.data for name, parameter in model.named_parameters()}
    # bitsandbytes keeps the first code table that it makes, which must not be one without numbers.
    bnb_functional.quantize_blockwise(torch.zeros(1))
    with local_torch_dtype(dtype):  # that of the biases of the layers that it puts in
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    if quantizer.readers:
        raise OrdMoEModelError(
            f"What {quantizer.readers[0]} ({type(model.get_submodule(quantizer.readers[0])).__name__}) takes in 4 bits "
            "is not known to `ordmoe plan`: its experts are outside transformers' experts interface, and dense while "
            "they run. Plan without `load_in_4bit`."
        )
    for name, weight in dense.items():
        if quantizer.is_stack(name):
            replace_tensor(model, name, quantizer.pack(_FirstOf(weight), name))
        elif quantizer.param_needs_quantization(model, name):
            settings = model.get_parameter(name).__dict__
            replace_tensor(model, name, quantize_linear_weight_(Params4bit(weight, **settings)))
    quantizer.postprocess_model(model)


class _FirstOf:
    """A stack of which only the first expert's matrix is read: where there are no numbers, one stands for all."""

    def __init__(self, weight_EOI: torch.Tensor):
        self.weight_EOI = weight_EOI

    def __len__(self) -> int:
        return len(self.weight_EOI)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.weight_EOI[:1])


def replace_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer `name`."""
    owner_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner_name), leaf, tensor)
