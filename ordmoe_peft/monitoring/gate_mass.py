"""How much weight routers give to the experts that a forward was held to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..moe_model import MoELayer
from ..router_output import read_router_output


@contextmanager
def recorded_gate_mass(layers: Sequence[MoELayer]) -> Iterator[list[torch.Tensor | None]]:
    """Within the block, append for each forward of each layer's router what its K weights sum to, per token.

    These are the weights that the router itself returned, before anything scales them: 1 for every tier where the
    router renormalises, and less from tier to tier where it does not (OLMoE, DeepSeek-V2).

    Yields:
        list of `torch.Tensor` of shape `(T,)`; `None` where the router returns no weights of shape `(T, K)`.
    """
    records: list[torch.Tensor | None] = []
    # Ahead of the hook that scales weights under tier_weights="match".
    handles = [layer.router.register_forward_hook(_recorder(layer, records), prepend=True) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _recorder(layer: MoELayer, records: list[torch.Tensor | None]):
    def record(module: nn.Module, args: tuple, output: Any) -> None:
        weights_TK = read_router_output(layer, output).weights_TK
        records.append(None if weights_TK is None else weights_TK.float().sum(-1))

    return record
