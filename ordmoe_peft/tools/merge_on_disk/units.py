"""What is done to each tensor of a checkpoint."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from transformers.core_model_loading import dot_natural_key

from ...errors import OrdMoEModelError
from .checkpoint import Checkpoint
from .parameter_sources import Source
from .weightless_model import Host


@dataclass
class Work:
    """Tensors that go into one shard together, and what is done to them.

    Args:
        names (`list[str]`): the checkpoint's tensors.
        sources (`list` of [`Source`]): the parameters that they make; none where they are copied.
        layers (`list` of [`~peft.tuners.lora.LoraLayer`]): what merges into these parameters.
    """

    names: list[str]
    sources: list[Source]
    layers: list[LoraLayer]


def plan_work(
    checkpoint: Checkpoint,
    host: Host,
    parameters: Mapping[str, Source],
    also_changed: Set[str],
) -> list[Work]:
    """What is done to each tensor of the checkpoint, in the checkpoint's order.

    Raises:
        [`OrdMoEModelError`]: the adapter adapts a parameter that the checkpoint has no tensor for.
    """
    works: list[Work] = []

    def join(sources: list[Source], layers: list[LoraLayer]) -> None:
        """One work for these, and for what shares a source with them."""
        touched = [work for work in works if any(source in work.sources for source in sources)]
        for work in touched:
            works.remove(work)
            sources = [*work.sources, *(source for source in sources if source not in work.sources)]
            layers = [*work.layers, *layers]
        works.append(Work([name for source in sources for name in source.names], sources, layers))

    for layer, names in host.adapted:
        missing = [name for name in names if name not in parameters]
        if missing:
            raise OrdMoEModelError(f"The adapter changes {missing[0]}, for which {checkpoint.folder} has no tensor.")
        join(list({id(parameters[name]): parameters[name] for name in names}.values()), [layer])
    for name in also_changed:
        if name in parameters:
            join([parameters[name]], [])
    changed = {name for work in works for name in work.names}
    works += [Work([name], [], []) for name in checkpoint.files if name not in changed]
    return sorted(works, key=lambda work: min(map(dot_natural_key, work.names)))
