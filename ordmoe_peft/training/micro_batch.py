"""Where a micro-batch stands in its step, as a value that travels with the batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator


# Key of a batch that carries it.
MICRO_BATCH = "micro_batch"


@dataclass(frozen=True)
class MicroBatch:
    """Where a micro-batch stands in its step, or in its evaluation.

    Args:
        index (`int`): its place over all processes, as if one process ran them in turn. Random draws depend on it, so
            two processes draw what one does that accumulates, and no two micro-batches draw the same.
        num_in_step (`int`): micro-batches of this process that a mean over the step is over.
        share_of_rows (`float` or `torch.Tensor`): weight of a mean over its rows with a response, so that micro-batches
            add up to a mean over the step's.
    """

    index: int = 0
    num_in_step: int = 1
    share_of_rows: torch.Tensor | float = 1.0


def index_over_processes(accelerator: Accelerator, index: int) -> int:
    """[`MicroBatch`]'s index, from that among the micro-batches of this process."""
    return index * accelerator.num_processes + accelerator.process_index


class NumberedBatches:
    """A data loader whose batches carry their [`MicroBatch`]; in all else the loader given.

    Args:
        loader (iterable of `dict`): the data loader.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
    """

    def __init__(self, loader: Any, accelerator: Accelerator):
        self.loader, self.accelerator = loader, accelerator

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, batch in enumerate(self.loader):
            yield {**batch, MICRO_BATCH: MicroBatch(index_over_processes(self.accelerator, index))}

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
