"""Every use of upstream names that are not public. Each entry says why it is needed and when it can go."""

import re
from collections.abc import Callable

import torch
from accelerate.hooks import ModelHook
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.utils.peft_types import PeftType
from torch import nn

# Tensors without numbers, and what sees each operation on them, have no public names (torch 2.13).
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from transformers import PreTrainedModel


# The operator of `torch.nn.functional.grouped_mm`, as dispatch modes see it; it has no public name (torch 2.13).
GROUPED_MM = torch.ops.aten._grouped_mm.default


def add_peft_type(name: str) -> None:
    """Add `name` to the `PeftType` enum, once.

    `peft.utils.register_peft_method` is open to third parties, but refuses names outside an enum that is not.
    Remove when peft registers methods by string (peft 0.21.2, `peft/utils/peft_types.py`).
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # Python 3.12 looks members up as class attributes


def keep_linear4bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the weights of linear layers in place at their first evaluation on some CPUs.

    The repacked bytes are not those that were loaded, nothing but its own product reads them, and layers whose width is
    not a multiple of 32 fail. Remove when the repacking is optional upstream (bitsandbytes 0.50.2,
    `bitsandbytes/nn/modules.py`).
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_repacked(weight: Params4bit) -> bool:
    """Whether bitsandbytes has done what [`keep_linear4bit_layout`] keeps it from."""
    return getattr(weight.quant_state, "packing_format_for_cpu", False)


def commit_of(config: object) -> str | None:
    """The commit on the hub that a configuration was loaded from; there is no public getter (transformers 5.24)."""
    return getattr(config, "_commit_hash", None)


def attention_implementation(model: nn.Module) -> str:
    """The name of the attention function that `model`'s text layers use; there is no public getter (5.23)."""
    return model.config.get_text_config()._attn_implementation


def as_parameter_wrapper(layer: type) -> type:
    """Give a LoRA layer on parameters the class name by which PEFT recognises such layers.

    PEFT nests them, and finds those of an earlier adapter, by `__class__.__name__ == "ParamWrapper"`
    (`BaseTuner._inject_parameters`, peft 0.21.2). Remove when it asks for the class.
    """
    layer.__name__ = "ParamWrapper"
    return layer


def experts_implementation(experts: nn.Module) -> str | None:
    """The name of the function that these experts run; the public getter answers for whole models alone (5.23)."""
    return experts.config._experts_implementation


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether `ep_size` shards these experts; transformers' own experts functions read the same attribute (5.23)."""
    return experts._is_expert_parallel


def activation_of(experts: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What these experts do between their two projections: the gate, whose method is private (5.23), or a function."""
    return experts._apply_gate if experts.has_gate else experts.act_fn


def wrap_checkpointing(model: nn.Module, wrap: Callable[[Callable], Callable]) -> None:
    """Replace the checkpoint function of each checkpointed layer of `model` by `wrap` of it, once.

    Gradient checkpointing runs a layer's forward again in backward, where nothing says what surrounded the first run.
    transformers gives each layer its checkpoint function as a private attribute (`modeling_layers.py`), and FSDP's
    activation checkpointing puts a wrapper with such a function around each layer (torch,
    `algorithms/_checkpoint/checkpoint_wrapper.py`); there is no hook around the recomputation. Remove when there is.
    """
    for module in model.modules():
        name = "checkpoint_fn" if isinstance(module, CheckpointWrapper) else "_gradient_checkpointing_func"
        checkpoint = module.__dict__.get(name)
        if checkpoint is not None and not getattr(checkpoint, "carries_tiers", False):
            carrying = wrap(checkpoint)
            carrying.carries_tiers = True  # type: ignore[attr-defined]
            setattr(module, name, carrying)


def save_in_own_names(model: nn.Module) -> None:
    """Have `save_pretrained` write the weights of `model` as they are, in its own names.

    transformers writes a model in the form in which it was read, and for that cuts fused stacks into experts, which
    packed stacks cannot be. The list of conversions to revert is a private attribute (5.23,
    `transformers/core_model_loading.py`). Remove when a quantizer can have a say in it.
    """
    model._weight_conversions = []


def save_in_original_format(model: nn.Module) -> None:
    """Undo [`save_in_own_names`]: `save_pretrained` uses the conversions of the model's family."""
    model._weight_conversions = None


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from initialising `module`, whose weights were quantised while they were loaded (5.23)."""
    module._is_hf_initialized = True


def accelerate_hook(module: nn.Module) -> ModelHook | None:
    """accelerate's hook on `module`, which moves its inputs between devices; there is no public getter (1.15)."""
    return getattr(module, "_hf_hook", None)


def own_forward_name(module: nn.Module) -> str:
    """The attribute that holds a replacement for the forward of `module`'s class.

    accelerate's hook is one itself, and keeps what it calls under a private name (1.15).
    """
    return "forward" if accelerate_hook(module) is None else "_old_forward"


def saved_tensors_hooks_in_use() -> tuple[Callable, Callable] | None:
    """The innermost `saved_tensors_hooks`, by which checkpointing works, too; there is no public getter (torch 2.13).

    torch applies the innermost alone, so who adds some has to call these.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def dtypes_kept(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The parameters and buffers that `from_pretrained(dtype=dtype)` holds in another dtype, by name.

    There is no public way to ask (transformers 5.23, `PreTrainedModel._get_dtype_plan`).
    """
    plan = {re.compile(pattern.replace("*", ".*")): kept for pattern, kept in model._get_dtype_plan(dtype).items()}
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return {name: kept for name in names for pattern, kept in plan.items() if pattern.search(name)}


def storage_id(storage: torch.UntypedStorage) -> int:
    """A number that tells storages apart, also those without memory, whose address is 0.

    There is no public one (torch 2.13).
    """
    return storage._cdata


def version_of(tensor: torch.Tensor) -> int:
    """How often `tensor` was written to in place; there is no public counter (torch 2.13). 0 for one of inference."""
    return 0 if tensor.is_inference() else tensor._version


def quantize_linear_weight_(weight: Params4bit) -> Params4bit:
    """Pack `weight` on whatever device it is on, the meta device too.

    `Params4bit.to` does so on devices that hold numbers alone (bitsandbytes 0.50.2, `bitsandbytes/nn/modules.py`).
    """
    return weight._quantize(weight.device)
