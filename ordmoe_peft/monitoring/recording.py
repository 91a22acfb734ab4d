"""Listen to routers and experts while forwards run: every observer of them does so by [`record`].

block ─ PEFT's wrapper ─ router ── chooses         → unscaled_router(call)
  │       │                └────── returns         → router(call), after tier_weights="match" has scaled weights
  │       └─────────────────────── returns         → wrapped_router(call), the adapter is off the router again
  └──── PEFT's wrappers ─ experts ─ return         → experts(call)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import OrdMoEModelError
from ..moe_model import MoELayer, MoEModel
from ..router_output import RouterOutput, read_router_output


@dataclass(frozen=True)
class Call:
    """A call of a layer's router or experts: what it was given, and what it returned."""

    layer: MoELayer
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    def argument(self, position: int, name: str) -> Any:
        """One of the arguments, given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs[name]

    @property
    def routing(self) -> RouterOutput:
        """What a router returned."""
        return read_router_output(self.layer, self.output)


Listener = Callable[[Call], None]


@contextmanager
def record(
    model: nn.Module,
    *,
    unscaled_router: Listener | None = None,
    router: Listener | None = None,
    wrapped_router: Listener | None = None,
    experts: Listener | None = None,
    layers: Sequence[MoELayer] | None = None,
) -> Iterator[None]:
    """Within the block, call listeners with each [`Call`] of `model`'s routers and experts, as drawn above.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        unscaled_router (`Callable`, *optional*): sees weights as the router gave them. It may not run the router again.
        router (`Callable`, *optional*): may run the router again, which is still the adapted one.
        wrapped_router (`Callable`, *optional*): may run the router again, which is the base's.
        experts (`Callable`, *optional*): sees what the block gave the experts.
        layers (sequence of [`~ordmoe_peft.moe_model.MoELayer`], *optional*): the layers to listen to; all by default.

    Raises:
        [`OrdMoEModelError`]: routers are listened to, and a layer has none of a known kind.
    """
    layers = MoEModel.of(model).layers if layers is None else layers
    without = [layer.block_name for layer in layers if layer.router is None]
    if without and (unscaled_router or router or wrapped_router):
        raise OrdMoEModelError(f"{', '.join(without)}: no router of a known kind, so its routing cannot be recorded.")
    with ExitStack() as hooks:
        for layer in layers:
            _listen(hooks, layer, layer.router, unscaled_router, is_first=True)
            _listen(hooks, layer, layer.router, router)
            _listen(hooks, layer, model.get_submodule(layer.router_name), wrapped_router)
            _listen(hooks, layer, model.get_submodule(layer.experts_name), experts)
        yield


def _listen(
    hooks: ExitStack, layer: MoELayer, module: nn.Module | None, listener: Listener | None, is_first: bool = False
) -> None:
    if module is None or listener is None:
        return

    def tell(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        listener(Call(layer, args, kwargs, output))

    hooks.callback(module.register_forward_hook(tell, with_kwargs=True, prepend=is_first).remove)


@contextmanager
def recorded_router_outputs(model: nn.Module, enabled: bool = True) -> Iterator[list[RouterOutput]]:
    """Within the block, append what each MoE layer's router says of all tokens to the list given.

    Its logits keep their graph. With `enabled=False` nothing is recorded.

    Raises:
        [`OrdMoEModelError`]: a layer has no known router, a router gives no logits or no indices, or no logits have a
            gradient in training.
    """
    outputs: list[RouterOutput] = []

    def append(call: Call) -> None:
        found = call.routing
        if found.logits_TE is None or found.index_TK is None:
            raise OrdMoEModelError(
                f"{call.layer.router_name} ({type(call.layer.router).__name__}) gives no logits of shape (tokens, "
                "experts) with the indices of the chosen experts, so what it routes cannot be recorded, which the "
                "balance loss needs: set balance_coef=0."
            )
        outputs.append(found)

    with record(model, router=append, layers=None if enabled else ()):
        yield outputs
    # The first layer's alone may have none: where only experts are adapted, nothing trains below its router.
    logits = [output.logits_TE for output in outputs if output.logits_TE is not None]
    if logits and model.training and torch.is_grad_enabled() and not any(part.requires_grad for part in logits):
        raise OrdMoEModelError(
            "Router logits have no gradient, so the balance loss would do nothing: reentrant gradient checkpointing "
            "cuts them off, or nothing is trained at or below a router. Set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or balance_coef=0."
        )


@contextmanager
def recorded_routing_weight_sums(
    model: nn.Module, layers: Sequence[MoELayer] | None = None
) -> Iterator[list[torch.Tensor | None]]:
    """Within the block, append for each call of each layer's router what its K weights sum to, for each token.

    These are the weights that the router itself returned, before anything scales them: 1 for every tier where the
    router renormalises, and less from tier to tier where it does not (OLMoE, DeepSeek-V2).

    Yields:
        list of `torch.Tensor` of shape `(T,)`; `None` where the router returns no weights of shape `(T, K)`.
    """
    sums: list[torch.Tensor | None] = []

    def append(call: Call) -> None:
        weights_TK = call.routing.weights_TK
        sums.append(None if weights_TK is None else weights_TK.float().sum(-1))

    with record(model, unscaled_router=append, layers=layers):
        yield sums
