"""A learning rate of their own for LoRA's factors on routers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..adapter.targets import adapted_modules, find_targets
from ..errors import OrdMoEConfigError
from .arguments import OrdMoETrainingArguments


class RouterRate(TrainerCallback):
    """Gives factors on routers the learning rate `rate`; schedules scale both rates alike.

    Args:
        rate (`float`): where the schedule begins.
    """

    def __init__(self, rate: float):
        self.rate = self.last = rate

    def split_groups_(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Move factors on routers from the groups of `optimizer`, which has taken no step, to groups of their own.

        A group has all that theirs had, such as its weight decay, but for the learning rate. They come last.

        Raises:
            [`OrdMoEConfigError`]: the optimizer does not hold all of them.
        """
        routers = {id(factor) for factor in router_factors(model)}
        taken: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            moved = [p for p in group["params"] if id(p) in routers]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in routers]
                taken.append({**group, "params": moved, "lr": self.rate})
        if sum(len(group["params"]) for group in taken) < len(routers):
            raise OrdMoEConfigError(
                f"router_learning_rate={self.rate} has no effect on {type(optimizer).__name__}, which does not hold "
                "the factors on routers in groups of parameters. Leave it unset, or set another optim."
            )
        for group in taken:
            optimizer.add_param_group(group)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.last = float(optimizer.param_groups[-1]["lr"])  # of this step: the schedule goes on after it


def router_factors(model: nn.Module) -> Sequence[nn.Parameter]:
    """The trainable LoRA factors on routers."""
    names = {target.name.removesuffix(".weight") for target in find_targets(model) if target.role == "router"}
    return [
        factor
        for name, module in adapted_modules(model)
        if name.removesuffix(".weight") in names
        for factor in (*module.lora_A.parameters(), *module.lora_B.parameters())
        if factor.requires_grad
    ]


def check_router_rate(args: OrdMoETrainingArguments, targets: Sequence[str], has_optimizer: bool) -> None:
    """See that `router_learning_rate` can act. `has_optimizer`: the trainer was given one that is made already.

    Raises:
        [`OrdMoEConfigError`]: it cannot.
    """
    if args.router_learning_rate is None:
        return
    reason = None
    if "router" not in targets:
        reason = f"targets={list(targets)}, which leaves routers as they are: add 'router'"
    elif has_optimizer:
        reason = "an optimizer of yours: give its groups their learning rates"
    elif args.deepspeed_plugin is not None and "optimizer" in args.deepspeed_plugin.deepspeed_config:
        reason = "an optimizer that DeepSpeed's configuration makes: take `optimizer` out of it"
    elif any(word in args.optim for word in ("lomo", "layerwise")):
        reason = f"optim={str(args.optim.value)!r}, which has one rate for all parameters: set another optim"
    if reason is not None:
        raise OrdMoEConfigError(
            f"router_learning_rate={args.router_learning_rate} has no effect with {reason}, or leave "
            "router_learning_rate unset."
        )
