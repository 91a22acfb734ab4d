"""What attaching an adapter changes in a model and its configuration, and how each change is undone."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def attached_or_unchanged(tuner: nn.Module, adapter_name: str) -> Iterator[None]:
    """Attach the adapter within the block. What raises there leaves the model and the configurations as they were.

    Args:
        tuner ([`~peft.tuners.tuners_utils.BaseTuner`]): what attaches, with the model in it.
        adapter_name (`str`): the adapter, whose configuration `tuner` has already.
    """
    model, configs = tuner.model, tuner.peft_config
    with ExitStack() as undo:
        undo.callback(configs.pop, adapter_name, None)
        # Modules that are wrapped, hooks, settings of LoRA layers that exist, the names that PEFT fills in.
        for owner in (configs[adapter_name], *tuner.modules()):
            undo.callback(_put_back, owner, _attributes(owner))
        for parameter in tuner.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        undo.callback(_set_experts_implementation, model, model.get_experts_implementation())
        yield
        undo.pop_all()


@contextmanager
def unchanged_on_error(owner: Any) -> Iterator[None]:
    """What raises within the block leaves the attributes of `owner` as they were."""
    before = _attributes(owner)
    with ExitStack() as undo:
        undo.callback(_put_back, owner, before)
        yield
        undo.pop_all()


@contextmanager
def weights_unchanged_on_error(modules: list[nn.Module]) -> Iterator[None]:
    """What raises within the block leaves the numbers of the modules' parameters as they were.

    It takes a copy of them, for initialisations such as PiSSA, which change the weights that they start from.
    """
    with ExitStack() as undo:
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            undo.callback(_put_numbers_back, parameter, parameter.data, parameter.data.clone())
        yield
        undo.pop_all()


def _attributes(owner: Any) -> dict[str, tuple[Any, Any]]:
    """The attributes of `owner`, each with a copy of its content where it is a container."""
    return {name: (value, value.copy() if _is_container(value) else None) for name, value in vars(owner).items()}


def _put_back(owner: Any, before: dict[str, tuple[Any, Any]]) -> None:
    vars(owner).clear()
    for name, (value, content) in before.items():
        if _is_container(value):  # the same object again: handles of hooks hold on to it
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        vars(owner)[name] = value


def _is_container(value: Any) -> bool:
    return type(value) in (dict, OrderedDict, list, set)


def _put_numbers_back(parameter: nn.Parameter, data: torch.Tensor, numbers: torch.Tensor) -> None:
    # Some initialisations write into the tensor, others give the parameter another one.
    parameter.data = data.copy_(numbers)


def _set_experts_implementation(model: nn.Module, before: dict[str, str]) -> None:
    if model.get_experts_implementation() != before:
        model.set_experts_implementation(before)
