"""What is made of an adapter's factors, kept between forwards without gradients: making it costs more than a decoding
step's use of it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kept:
    """A tensor and what it was made of.

    Args:
        value (`torch.Tensor`): what is kept.
        sources (`tuple` of `torch.Tensor`): share memory with what it was made of, so that nothing else can take their
            addresses.
        versions (`tuple` of `int`), rows (`tuple` of `torch.Tensor`): of the sources, which may have been written to
            since; their first rows.
        firsts (`tuple` of `torch.Tensor`): views of the first rows as they are now.
    """

    value: torch.Tensor
    sources: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]
    rows: tuple[torch.Tensor, ...]
    firsts: tuple[torch.Tensor, ...]

    def is_of(self, *tensors: torch.Tensor) -> bool:
        """Whether it is made of these tensors as they are now.

        Writing through `.data` does not count as a version; the first row gives that away.
        """
        return all(
            tensor._version == version
            and tensor.data_ptr() == source.data_ptr()
            and tensor.dtype == source.dtype
            and torch.equal(first, row)
            for tensor, source, version, first, row in zip(
                tensors, self.sources, self.versions, self.firsts, self.rows, strict=True
            )
        )


def may_be_kept(*sources: torch.Tensor) -> bool:
    """Not in training, not on accelerators, which a comparison would hold up, and not of tensors without a version."""
    return not torch.is_grad_enabled() and not any(
        source.device.type != "cpu" or source.is_inference() for source in sources
    )


def keep(
    store: dict[Hashable, Kept], key: Hashable, sources: tuple[torch.Tensor, ...], make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """`make()`, or what it gave before in `store`, if `sources` are what they were."""
    kept = store.get(key)
    if kept is None or not kept.is_of(*sources):
        detached = tuple(source.detach() for source in sources)
        firsts = tuple(source[0] for source in detached)
        versions = tuple(source._version for source in sources)
        kept = store[key] = Kept(make(), detached, versions, tuple(first.clone() for first in firsts), firsts)
    return kept.value
