"""What travels with a batch through upstream's trainer, as values among its inputs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from accelerate import Accelerator


# Keys of a batch: where it stands in its step, and which of its tier passes runs.
MICRO_BATCH = "micro_batch"
TIER_PASS = "tier_pass"


@dataclass(frozen=True)
class MicroBatch:
    """Where a micro-batch stands in its step, or in its evaluation.

    Args:
        index (`int`): its place over all processes, as if one process ran them in turn. Random draws depend on it, so
            two processes draw what one does that accumulates, and no two micro-batches draw the same.
        share_of_rows (`float` or `torch.Tensor`): weight of a mean over its rows with a response, so that micro-batches
            add up to a mean over the step's.
    """

    index: int = 0
    share_of_rows: torch.Tensor | float = 1.0


def numbered(
    batches: Iterable[Any], accelerator: Accelerator, shares: Iterable[torch.Tensor | float] = repeat(1.0)
) -> Iterator[dict[str, Any]]:
    """The batches of this process, in their order, each with its [`MicroBatch`]."""
    for index, (batch, share) in enumerate(zip(batches, shares, strict=False)):
        over_processes = index * accelerator.num_processes + accelerator.process_index
        yield {**batch, MICRO_BATCH: MicroBatch(over_processes, share)}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without what travels with it."""
    return {name: value for name, value in batch.items() if name not in (MICRO_BATCH, TIER_PASS)}


class NumberedBatches:
    """A data loader whose batches are [`numbered`]; in all else the loader given."""

    def __init__(self, loader: Any, accelerator: Accelerator):
        self.loader, self.accelerator = loader, accelerator

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return numbered(self.loader, self.accelerator)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
