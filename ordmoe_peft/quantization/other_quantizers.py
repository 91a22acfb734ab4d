"""Whether the experts of a model can be read at all: by us in 4 bits, or as plain numbers.

Other quantisers either leave stacks of experts alone, which works, or replace their module or their weights by
something that neither the experts function nor LoRA on it can read.
"""

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import MoEModel, unwrapped, without_wrappers
from .config import QUANT_METHOD
from .memory_by_role import in_units
from .storage import PACKABLE_DTYPES, is_packed


logger = logging.get_logger(__name__)

FIXES = {
    "mxfp4": "`from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True))` gives it bf16 experts.",
    "fp8": "`from_pretrained(…, quantization_config=FineGrainedFP8Config(dequantize=True))` gives it bf16 experts.",
}
OTHERWISE = "Load the unquantised checkpoint, with `quantization_config=MoeBitsAndBytesConfig()` for 4-bit experts."


def check_expert_storage(model: nn.Module) -> None:
    """See that all experts are readable, and warn where 4-bit loading left them unquantised.

    Raises:
        [`OrdMoEModelError`]: another quantiser has made the experts into something that cannot be adapted.
    """
    method = quant_method(getattr(model, "config", None))
    fix = FIXES.get(method or "", OTHERWISE)
    for name, module in model.named_modules():
        kind = unreadable_kind(unwrapped(module))
        if kind is not None:
            raise OrdMoEModelError(
                f"{without_wrappers(name)} is {kind}: the model is quantised by {method or 'something'}, whose experts "
                f"OrdMoE cannot read. {fix}"
            )
    if method is None or method == QUANT_METHOD:
        return
    try:
        MoEModel.of(model)
    except OrdMoEModelError as error:
        raise OrdMoEModelError(
            f"{type(model).__name__} is quantised by {method} and has no experts that OrdMoE could adapt. {fix}"
        ) from error
    warn_of_dense_experts(model, method)


def check_unquantised(config: PreTrainedConfig, name: str) -> None:
    """See that the checkpoint `name` can be loaded in 4 bits, from its configuration.

    Raises:
        [`OrdMoEConfigError`]: something else has quantised it; transformers would refuse a second quantisation.
    """
    method = quant_method(config)
    if method is not None and method != QUANT_METHOD:
        raise OrdMoEConfigError(
            f"{name} is quantised by {method}, so it cannot be loaded in 4 bits. Use an unquantised copy of it, or "
            f"leave `load_in_4bit` off. {FIXES.get(method, '')}".rstrip()
        )


def quant_method(model_config: PreTrainedConfig | None) -> str | None:
    """The name of what quantised a model, from its configuration."""
    config = getattr(model_config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def unreadable_kind(module: nn.Module) -> str | None:
    """What `module` is, if it is an expert or a stack of experts in a form that cannot be read."""
    kind = type(module).__name__
    if "Expert" not in kind:
        return None
    for name, weight in module.named_parameters(recurse=False):
        if name.endswith("_bias") or weight.dim() < 2 or is_packed(weight):
            continue
        # What a parameter of a subclass holds is unknown, unless it is one that torch has sharded.
        if type(weight) is not nn.Parameter and not hasattr(weight, "device_mesh"):
            return f"a {kind} whose {name} is a {type(weight).__name__}"
        if weight.dtype not in PACKABLE_DTYPES:
            return f"a {kind} whose {name} is {str(weight.dtype).removeprefix('torch.')}"
    return None


def warn_of_dense_experts(model: nn.Module, method: str) -> None:
    """Say how much memory the experts take that the quantiser left alone."""
    # Without repetition: stacks of layers may share them.
    stacks = list({stack: None for layer in MoEModel.of(model).all_layers for stack in layer.stacks.values()})
    dense = sum(stack.nbytes for stack in stacks if not is_packed(stack))
    if dense:
        total = sum(parameter.nbytes for parameter in model.parameters())
        logger.warning(
            f"The model was quantised by {method}, which leaves stacks of experts as they are: {in_units(dense)} of "
            f"its {in_units(total)} are experts in {str(stacks[0].dtype).removeprefix('torch.')}. Load it with "
            "`quantization_config=MoeBitsAndBytesConfig()` to have them in 4 bits, "
            f"about {in_units(sum(stack.numel() for stack in stacks) * 9 // 16)}."
        )
