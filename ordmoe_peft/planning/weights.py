"""A model as it would be loaded, without its weights, and what they take, to the byte.

The model is built on the meta device and goes through the loader's own steps, so what is quantised, and how, is the
loader's decision. Storages are counted as they are after loading: packed bytes, scales, code tables.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

from .._compat import dtypes_kept
from ..errors import OrdMoEModelError
from ..moe_layers import find_moe_layers, without_wrappers
from ..quantization.config import MoeBitsAndBytesConfig
from ..quantization.quantizer import MoeBnb4BitHfQuantizer
from ..quantization.storage import BLOCK_SIZE, is_packed, logical_shape


ROLES = ("experts", "shared_experts", "attention", "router", "embeddings", "head", "norms", "vision", "other")


@dataclass(frozen=True)
class WeightShare:
    """The weights of one role in one form.

    Args:
        role (`str`): one of [`ROLES`].
        form (`str`): how they are stored: a dtype, `"nf4"` or `"fp4"`.
        weights (`int`): how many numbers they are.
        size (`int`): what they take, in bytes.
    """

    role: str
    form: str
    weights: int
    size: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales and tables included."""
        return 8 * self.size / self.weights


# -------------------------------------------------------------------------------------------------------------- model
def build_meta_model(
    config: PretrainedConfig, dtype: torch.dtype, quantization: MoeBitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The model that `from_pretrained` would give for `config`, on the meta device.

    Args:
        config ([`~transformers.PretrainedConfig`]): its configuration.
        dtype (`torch.dtype`): that of unquantised weights.
        quantization ([`MoeBitsAndBytesConfig`], *optional*): how it is quantised while it is loaded.

    Raises:
        [`OrdMoEModelError`]: it has no MoE layers, or they cannot be quantised.
    """
    with torch.device("meta"), _default_dtype(dtype):
        model = model_class(config)(copy.deepcopy(config))  # loading writes into it
    find_moe_layers(model)
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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _quantise(model: PreTrainedModel, dtype: torch.dtype, config: MoeBitsAndBytesConfig) -> None:
    quantizer = MoeBnb4BitHfQuantizer(config, pre_quantized=False)
    dense = {name: parameter.data for name, parameter in model.named_parameters()}
    _fill_code_table_cache()
    with _default_dtype(dtype):  # that of the biases of the layers that it puts in
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    for name in dense:
        if quantizer.param_needs_quantization(model, name):
            replace_tensor(model, name, _packed_on_meta(dense[name], config))
    quantizer.postprocess_model(model)


def _packed_on_meta(weight: torch.Tensor, config: MoeBitsAndBytesConfig) -> Params4bit:
    """What packing `weight` gives; `Params4bit.to` itself leaves meta tensors alone."""
    data, state = bnb_functional.quantize_4bit(
        weight,
        blocksize=BLOCK_SIZE,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    state.dtype = config.bnb_4bit_compute_dtype or state.dtype
    return Params4bit(
        data,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        bnb_quantized=True,
    )


def _fill_code_table_cache() -> None:
    """Quantise something real: bitsandbytes keeps the first code table it makes, which must not be a meta tensor."""
    bnb_functional.quantize_blockwise(torch.zeros(1))


def replace_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer `name`."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor


# -------------------------------------------------------------------------------------------------------------- bytes
def weight_shares(model: PreTrainedModel) -> list[WeightShare]:
    """What the parameters and buffers of `model` take, by role and form, in the order of [`ROLES`]."""
    role_of, seen = _RoleOf(model), set()
    counted: dict[tuple[str, str], tuple[int, int]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        size = sum(_new_bytes(part, seen) for part in stored_tensors(tensor))
        form = tensor.quant_state.quant_type if is_packed(tensor) else str(tensor.dtype).removeprefix("torch.")
        weights, total = counted.get((role_of(name), form), (0, 0))
        counted[role_of(name), form] = (weights + logical_shape(tensor).numel(), total + size)
    shares = [WeightShare(role, form, *sizes) for (role, form), sizes in counted.items()]
    return sorted(shares, key=lambda share: (ROLES.index(share.role), share.form))


def stored_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a weight: itself, and the quantisation state of a packed one."""
    if not is_packed(tensor):
        return [tensor]
    state = tensor.quant_state
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [tensor, state.absmax, state.code, *nested]


def _new_bytes(tensor: torch.Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage._cdata in seen:
        return 0
    seen.add(storage._cdata)
    return storage.nbytes()


class _RoleOf:
    """From a parameter's name to its role."""

    def __init__(self, model: PreTrainedModel):
        self.model, layers = model, find_moe_layers(model)
        self.decoders = tuple(dict.fromkeys(f"{layer.decoder_layers_name}." for layer in layers))
        self.text_models = tuple(f"{name[:-1].rpartition('.')[0]}." for name in self.decoders)
        self.experts = tuple(f"{layer.experts_name}." for layer in layers)
        self.routers = tuple(f"{layer.router_name}." for layer in layers if layer.router is not None)
        self.blocks = tuple(f"{layer.block_name}." for layer in layers)
        self.head = model.get_output_embeddings()

    def __call__(self, name: str) -> str:
        name = without_wrappers(name)
        module = self.model.get_submodule(name.rpartition(".")[0])
        if module is self.head:
            return "head"
        if name.startswith(self.experts):
            return "experts"
        if name.startswith(self.routers):
            return "router"
        if not name.startswith(self.text_models):
            return "vision"
        if "norm" in type(module).__name__.lower():
            return "norms"
        if isinstance(module, nn.Embedding):
            return "embeddings"
        if not name.startswith(self.decoders):
            return "other"
        if name.startswith(self.blocks) and "shared" in name:
            return "shared_experts"
        return "attention" if "attn" in name or "attention" in name else "other"
