"""Collect what routers say during a forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import OrdMoEModelError
from ..moe_layers import MoELayer, find_moe_layers


@contextmanager
def recorded_router_logits(model: nn.Module, enabled: bool = True) -> Iterator[list[torch.Tensor]]:
    """Within the block, append each MoE layer's router logits (`torch.Tensor` of shape `(T, E)`) to the list given.

    They keep their graph. With `enabled=False` nothing is recorded.

    Raises:
        [`OrdMoEModelError`]: a router gives no logits, or none of them has a gradient in training.
    """
    records: list[torch.Tensor] = []
    handles = [
        layer.router.register_forward_hook(_recorder(layer, records))
        for layer in (find_moe_layers(model) if enabled else [])
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
    # The first layer's alone may have none: where only experts are adapted, nothing trains below its router.
    if records and model.training and torch.is_grad_enabled() and not any(logits.requires_grad for logits in records):
        raise OrdMoEModelError(
            "Router logits have no gradient, so the balance loss would do nothing: reentrant gradient checkpointing "
            "cuts them off, or nothing is trained at or below a router. Set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or balance_coef=0."
        )


def _recorder(layer: MoELayer, records: list[torch.Tensor]):
    def record(module: nn.Module, args: tuple, output) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        if logits.dim() != 2 or logits.shape[1] != layer.num_experts:
            raise OrdMoEModelError(
                f"{layer.router_name} ({type(module).__name__}) gives no (tokens, experts) logits, which the balance "
                "loss needs: set balance_coef=0."
            )
        records.append(logits)

    return record
