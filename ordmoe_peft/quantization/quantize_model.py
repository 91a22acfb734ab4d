"""4-bit experts for a model that is in memory already."""

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import check_no_adapter
from .config import MoeBitsAndBytesConfig
from .quantizer import MoeBnb4BitHfQuantizer


def quantize_experts_(model: PreTrainedModel, config: MoeBitsAndBytesConfig | None = None) -> PreTrainedModel:
    """Pack the fused experts of `model` in 4 bits, in place.

    One stack after the other, each dense one freed before the next is packed: memory never exceeds the dense model's by
    more than one packed stack. Everything else keeps its dtype, the linear layers of the decoder too, which a model
    loaded with the same configuration has in 4 bits. From here on the model is like a loaded one: to
    `save_pretrained`, `dequantize`, PEFT and trainers.

    Args:
        model ([`~transformers.PreTrainedModel`]): a dense model with fused experts, without adapters.
        config ([`MoeBitsAndBytesConfig`], *optional*): the kind of quantisation, by default NF4 without double
            quantisation, computed in float32. Experts named in `llm_int8_skip_modules` stay as they are. With
            `offload_experts` each stack goes to RAM as soon as it is packed.

    Returns:
        [`~transformers.PreTrainedModel`]: `model` itself.

    Raises:
        [`OrdMoEConfigError`]: `config` is of another class.
        [`OrdMoEModelError`]: `model` is not of transformers, has no fused experts, is quantised already, has an
            adapter, is not in memory as a whole, in another dtype than bitsandbytes packs, or shares a stack between
            layers. It is left as it was. Where RAM cannot be pinned for a stack (`offload_experts`), those before it
            are packed already, and the model has to be loaded anew.
    """
    config = MoeBitsAndBytesConfig() if config is None else config
    if not isinstance(config, MoeBitsAndBytesConfig):
        raise OrdMoEConfigError(f"quantize_experts_ takes a MoeBitsAndBytesConfig, got {type(config).__name__}.")
    _check_dense(model)
    quantizer = MoeBnb4BitHfQuantizer(config, pre_quantized=False)
    # By their last two names: a list of all would take transformers long to go through at every loading.
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantizer.select(model, {".".join(name.split(".")[-2:]) for name in linears})
    _check_stacks(model, quantizer.expert_stacks)
    for name in sorted(quantizer.expert_stacks):
        module, parameter_name = get_module_from_name(model, name)
        setattr(module, parameter_name, quantizer.pack(getattr(module, parameter_name).data, name))
    quantizer.adopt(model)
    return model


def _check_dense(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise OrdMoEModelError(
            f"quantize_experts_ takes a model of transformers, got {type(model).__name__}. Quantise the base first, "
            "then put the adapter on it."
        )
    check_no_adapter(model, "quantise it")
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise OrdMoEModelError(
            f"{type(model).__name__} is quantised already, by {getattr(method, 'value', method)!r}: load it dense, or "
            "call `model.dequantize()` first."
        )


def _check_stacks(model: PreTrainedModel, names: set[str]) -> None:
    if not names:
        raise OrdMoEModelError("llm_int8_skip_modules names all experts of the model: there is nothing to quantise.")
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in names:
            continue
        if parameter.is_meta:
            raise OrdMoEModelError(
                f"{name} is not in memory (offloaded, or on the meta device): load the model as a whole, or in 4 bits "
                "with `from_pretrained(..., quantization_config=MoeBitsAndBytesConfig(...))`."
            )
        first = owners.setdefault(parameter.data_ptr(), name)
        if first != name:
            raise OrdMoEModelError(
                f"{first} and {name} are one and the same stack, which packing would part: add their modules to "
                "`llm_int8_skip_modules` to leave them as they are."
            )
