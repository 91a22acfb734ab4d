"""4-bit experts for a model that is in memory already."""

from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import MoEModel, check_no_adapter
from .config import MoeBitsAndBytesConfig
from .dequantization import succeed_
from .quantizer import MoeBnb4BitHfQuantizer
from .selection import expert_linears, stack_readers
from .storage import BLOCK_SIZE


def quantize_experts_(model: PreTrainedModel, config: MoeBitsAndBytesConfig | None = None) -> PreTrainedModel:
    """Pack the experts of `model` in 4 bits, in place: stacks, and linear layers of experts that are modules.

    One stack after the other, each dense one freed before the next is packed: memory never exceeds the dense model's by
    more than one packed stack. A stack that layers share is packed once and stays shared. Everything else keeps its
    dtype, the other linear layers of the decoder too, which a model loaded with the same configuration has in 4 bits.
    From here on the model is like a loaded one: to `save_pretrained`, `dequantize`, PEFT and trainers.

    Args:
        model ([`~transformers.PreTrainedModel`]): a dense model with routed experts, without adapters.
        config ([`MoeBitsAndBytesConfig`], *optional*): the kind of quantisation, by default NF4 without double
            quantisation, computed in float32. Experts named in `llm_int8_skip_modules` stay as they are. With
            `offload_experts` each stack goes to RAM as soon as it is packed.

    Returns:
        [`~transformers.PreTrainedModel`]: `model` itself.

    Raises:
        [`OrdMoEConfigError`]: `config` is of another class.
        [`OrdMoEModelError`]: `model` is not of transformers, has no routed experts or some that cannot be packed, is
            quantised already, has an adapter, is not in memory as a whole, in another dtype than bitsandbytes packs, or
            shares a stack with a module that is to keep it. It is left as it was. Where RAM cannot be pinned for a
            stack (`offload_experts`), those before it are packed already, and the model has to be loaded anew.
    """
    config = MoeBitsAndBytesConfig() if config is None else config
    if not isinstance(config, MoeBitsAndBytesConfig):
        raise OrdMoEConfigError(f"quantize_experts_ takes a MoeBitsAndBytesConfig, got {type(config).__name__}.")
    _check_dense(model)
    quantizer = MoeBnb4BitHfQuantizer(config, pre_quantized=False)
    quantizer.select(model, _linears_to_keep(model, config))
    stacks, linears = quantizer.expert_stacks, {name: model.get_submodule(name) for name in quantizer.expert_linears}
    if not stacks and not linears:
        raise OrdMoEModelError(
            "There is nothing to quantise: llm_int8_skip_modules names all experts of the model, or the rows of their "
            f"matrices are not whole blocks of {BLOCK_SIZE} weights."
        )
    of_stacks = _owners(model, stacks)
    of_linears = _owners(model, {f"{name}.weight" for name in linears})
    for names in of_stacks:
        packed = quantizer.pack(model.get_parameter(names[0]).data, names[0])
        for name in names:
            module, parameter_name = get_module_from_name(model, name)
            setattr(module, parameter_name, packed)
    if linears:
        quantizer.replace_linears_(model)
    for names in of_linears:
        _pack_linears_(model, {name: linears.pop(name) for name in [name.removesuffix(".weight") for name in names]})
    quantizer.adopt(model)
    return model


def _linears_to_keep(model: PreTrainedModel, config: MoeBitsAndBytesConfig) -> set[str]:
    """All linear layers but those of experts that are modules, by their last two names where those are not what is
    packed, too: a list of all would take transformers long to go through at every loading."""
    layers = MoEModel.of(model).all_layers
    packed = expert_linears(layers, config.llm_int8_skip_modules)
    stacks = stack_readers(layers)
    owners = {stack.rpartition(".")[0] for stack in stacks}
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    endings = {name: ".".join(name.split(".")[-2:]) for name in kept}
    others = {*packed, *stacks, *owners, *stacks.values()}
    taken = {ending for ending in {*endings.values()} if any(other.endswith(ending) for other in others)}
    return {name if ending in taken else ending for name, ending in endings.items()}


def _pack_linears_(model: PreTrainedModel, dense: dict[str, nn.Linear]) -> None:
    """Pack the weight of `dense`, linear layers that share it, into the 4-bit layers that are in their places."""
    packed: Params4bit | None = None
    for name, predecessor in dense.items():
        linear, weight = model.get_submodule(name), predecessor.weight.data
        if not isinstance(linear, Linear4bit):  # transformers keeps it in float32
            continue
        if packed is None:
            packed = Params4bit(weight, **vars(linear.weight)).to(weight.device)
        linear.weight, linear.bias = packed, predecessor.bias
        succeed_(linear, predecessor)


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


def _owners(model: PreTrainedModel, names: set[str]) -> list[list[str]]:
    """The names of each weight of `names`: several where modules share it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names and parameter.is_meta:
            raise OrdMoEModelError(
                f"{name} is not in memory (offloaded, or on the meta device): load the model as a whole, or in 4 bits "
                "with `from_pretrained(..., quantization_config=MoeBitsAndBytesConfig(...))`."
            )
        owners.setdefault(parameter.data_ptr(), []).append(name)
    shared = [group for group in owners.values() if names & {*group}]
    for group in shared:
        if not names >= {*group}:
            kept = next(name for name in group if name not in names)
            packed = next(name for name in group if name in names)
            raise OrdMoEModelError(
                f"{packed} and {kept} are one and the same weight, of which the former alone is to be packed: name "
                "both in `llm_int8_skip_modules`, or none."
            )
    return sorted(shared)
