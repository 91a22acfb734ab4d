"""Collect what routers say during a forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import OrdMoEModelError
from ..moe_model import MoELayer, find_moe_layers
from ..router_output import RouterOutput, read_router_output


@contextmanager
def recorded_router_outputs(model: nn.Module, enabled: bool = True) -> Iterator[list[RouterOutput]]:
    """Within the block, append what each MoE layer's router says of all tokens to the list given.

    Its logits keep their graph. With `enabled=False` nothing is recorded.

    Raises:
        [`OrdMoEModelError`]: a layer has no known router, a router gives no logits or no indices, or no logits have a
            gradient in training.
    """
    records: list[RouterOutput] = []
    layers = find_moe_layers(model) if enabled else []
    without = [layer.block_name for layer in layers if layer.router is None]
    if without:
        raise OrdMoEModelError(f"{', '.join(without)}: no router of a known kind, so its routing cannot be recorded.")
    handles = [layer.router.register_forward_hook(_recorder(layer, records)) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
    # The first layer's alone may have none: where only experts are adapted, nothing trains below its router.
    is_training = records and model.training and torch.is_grad_enabled()
    if is_training and not any(record.logits_TE.requires_grad for record in records):
        raise OrdMoEModelError(
            "Router logits have no gradient, so the balance loss would do nothing: reentrant gradient checkpointing "
            "cuts them off, or nothing is trained at or below a router. Set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or balance_coef=0."
        )


def _recorder(layer: MoELayer, records: list[RouterOutput]):
    def record(module: nn.Module, args: tuple, output: Any) -> None:
        found = read_router_output(layer, output)
        if found.logits_TE is None or found.index_TK is None:
            raise OrdMoEModelError(
                f"{layer.router_name} ({type(module).__name__}) gives no logits of shape (tokens, experts) with the "
                "indices of the chosen experts, which the balance loss needs: set balance_coef=0."
            )
        records.append(found)

    return record
