"""What a router returned: the one place that reads it.

Most of transformers' routers return (logits, weights, indices); some have fewer or more parts, or others in between.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .moe_model import MoELayer


# Place of the chosen experts' weights in what transformers' routers return.
WEIGHTS = 1


class RouterOutput(NamedTuple):
    """The parts of a router's output; `None` where it has none of that kind.

    Args:
        logits_TE (`torch.Tensor` of shape `(T, E)`, *optional*): a number for each expert.
        weights_TK (`torch.Tensor` of shape `(T, K)`, *optional*): weights of the chosen experts.
        index_TK (`torch.Tensor` of shape `(T, K)`, *optional*): the chosen experts.
    """

    logits_TE: torch.Tensor | None
    weights_TK: torch.Tensor | None
    index_TK: torch.Tensor | None

    def of_tokens(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "RouterOutput":
        """The same of some tokens, which `pick` takes out of values of all (`torch.Tensor` of shape `(T, …)`)."""
        return RouterOutput(*(None if part is None else pick(part) for part in self))


def read_router_output(layer: MoELayer, output: Any) -> RouterOutput:
    """The parts of what the router of `layer` returned."""
    parts = output if isinstance(output, tuple) else (output,)
    logits_TE = parts[0] if _has_width(parts[0], layer.num_experts, is_index=False) else None
    has_weights = len(parts) > WEIGHTS and _has_width(parts[WEIGHTS], layer.top_k, is_index=False)
    indices = [part for part in parts if _has_width(part, layer.top_k, is_index=True)]
    return RouterOutput(logits_TE, parts[WEIGHTS] if has_weights else None, indices[0] if len(indices) == 1 else None)


def _has_width(part: Any, width: int, is_index: bool) -> bool:
    if not isinstance(part, torch.Tensor) or part.dim() != 2 or part.shape[1] != width:
        return False
    return not (part.is_floating_point() or part.dtype == torch.bool) if is_index else part.is_floating_point()
