"""How transformers renames tensors of a checkpoint for the model's own names.

It does so with tensors that have the model's names already, too: most renamings leave them alone, some do not. PEFT
does the same with adapters of type LORA, and transformers' own `load_adapter` with any.
"""

from collections.abc import Iterable

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..errors import OrdMoEModelError


# Of PEFT's names of tensors, before the model's own.
PREFIX = "base_model.model."


def renamings_of(model: nn.Module) -> list[WeightRenaming]:
    """What transformers does to names of a checkpoint for `model`, in its order."""
    return [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]


def renamed(name: str, renamings: list[WeightRenaming]) -> tuple[str, list[WeightRenaming]]:
    """What `renamings` make of a name, and those of them that apply to it."""
    applied = []
    for renaming in renamings:
        before, (name, _) = name, renaming.rename_source_key(name)
        if name != before:
            applied.append(renaming)
    return name, applied


def name_before(name: str, renamings: list[WeightRenaming]) -> str:
    """The name from which those of `renamings` that apply to `name` make `name`, if they can be undone."""
    for renaming in reversed(renamed(name, renamings)[1]):
        name, _ = renaming.reverse_transform().rename_source_key(name)
    return name


def check_read_by_transformers(names: Iterable[str], model: nn.Module) -> None:
    """See that transformers' own `load_adapter` reads each of an adapter's tensors, of these names, as what it is.

    Raises:
        [`OrdMoEModelError`]: it would not.
    """
    renamings = renamings_of(model)
    for own in names:
        other, _ = renamed(own, renamings)
        if other != own:
            raise OrdMoEModelError(
                f"transformers' own load_adapter would read {own} as {other}, which the model does not have, and leave "
                "that part of the adapter at random numbers. Load it by PeftModel.from_pretrained."
            )
