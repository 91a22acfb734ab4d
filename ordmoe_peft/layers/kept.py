"""What is made of an adapter's factors, kept between forwards without gradients: making it costs more than a decoding
step's use of it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch


class Source:
    """A tensor as it was when something was made of it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach()  # shares its memory, so that nothing else can take its address
        self.version, self.address = tensor._version, tensor.data_ptr()
        # Writing through `.data` does not count as a version; the first row gives that away. A tensor, as a view of the
        # bytes in numpy would keep FSDP from freeing the storage.
        self.first_row_now = self.tensor[0]
        self.first_row = self.first_row_now.clone()

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether this is the tensor, as it was."""
        return (
            tensor._version == self.version
            and tensor.data_ptr() == self.address
            and tensor.dtype == self.tensor.dtype
            and torch.equal(self.first_row_now, self.first_row)
        )


@dataclass(frozen=True)
class Kept:
    """Something, and what it was made of."""

    value: Any
    sources: list[Source]

    def is_of(self, *tensors: torch.Tensor) -> bool:
        """Whether it is made of these tensors as they are now."""
        return all(source.is_still(tensor) for source, tensor in zip(self.sources, tensors, strict=True))


def may_be_kept(*sources: torch.Tensor) -> bool:
    """Not in training, not on accelerators, which a comparison would hold up, and not of tensors without a version.

    Nor while a forward is traced, which would look at the tensors once and not again.
    """
    return (
        not torch.is_grad_enabled()
        and not any(source.device.type != "cpu" or source.is_inference() for source in sources)
        and not torch.compiler.is_compiling()
    )


def keep(store: dict[Hashable, Kept], key: Hashable, sources: tuple[torch.Tensor, ...], make: Callable[[], Any]) -> Any:
    """`make()`, or what it gave before in `store`, if `sources` are what they were."""
    kept = store.get(key)
    if kept is None or not kept.is_of(*sources):
        kept = store[key] = Kept(make(), [Source(source) for source in sources])
    return kept.value
