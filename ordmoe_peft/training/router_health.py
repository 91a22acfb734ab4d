"""Router health while a model trains."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..monitoring.health import LayerHealth
from ..monitoring.router_meter import RouterMeter


logger = logging.get_logger(__name__)

# Logged name → (the figure of a layer, which of the layers' figures is the worst, if either end is bad).
METRICS: dict[str, tuple[str, Callable[[Sequence[float]], float] | None]] = {
    "router/dead_experts": ("dead", max),
    "router/imbalance": ("imbalance", max),
    "router/marginal_entropy": ("marginal_entropy", min),
    "router/token_entropy": ("token_entropy", None),
    "router/score_std": ("score_std", min),
    "router/drift_overlap": ("drift_overlap", min),
    "router/drift_kl": ("drift_kl", max),
}


class RouterHealth(TrainerCallback):
    """Adds the routers' health since the last log to what a trainer logs.

    Each figure of [`~ordmoe_peft.monitoring.health.LayerHealth`] that is logged is a mean over layers, as
    `router/imbalance`, and where one end is bad that of the worst layer, as `router/imbalance_worst`. They are of all
    processes' training tokens on tier 1, without padding; evaluation and generation do not count. A log that covers
    few tokens finds experts dead that are only rare.

    Add it with [`RouterHealth.add_to`]. Given as one of a trainer's `callbacks`, it comes after those that report, so
    only the trainer's log history and its printed logs have the figures. Layers whose routers cannot be read are left
    out, which a warning says as training begins.

    Raises:
        [`OrdMoEModelError`]: when training begins, and the model has no MoE layers.
    """

    def __init__(self):
        self.meter: RouterMeter | None = None
        self._open = ExitStack()

    @classmethod
    def add_to(cls, trainer: Trainer) -> "RouterHealth":
        """Put a new callback on `trainer`, ahead of those that report to tensorboard, wandb and the like."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._open.close()  # a training run that failed left it open
        self.meter = self._open.enter_context(RouterMeter(model, training_only=True))
        if unread := self.meter.unsupported | self.meter.unread:
            count, first = f"{len(unread)} of {len(self.meter.moe_layers)}", next(iter(unread.values()))
            logger.warning(f"The health of {count} routers is not logged: {first.removesuffix('.')}.")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.meter is None or "loss" not in (logs or {}):  # logs of evaluation, or the last, of the whole run
            return
        metrics = health_metrics(self.meter.report(reduce=partial(reduce, reduction="sum")))
        self.meter.reset()
        logs.update(metrics)
        state.log_history[-1].update(metrics)  # a copy of the logs, made before callbacks see them

    def on_train_end(self, args, state, control, **kwargs):
        self._open.close()
        self.meter = None


def health_metrics(layers: list[LayerHealth]) -> dict[str, Any]:
    """Means over layers, and the worst layer's, of what is logged; figures that no layer has are left out."""
    metrics = {}
    for name, (field, worst) in METRICS.items():
        values = [value for layer in layers if (value := getattr(layer, field)) is not None]
        if values:
            metrics[name] = sum(values) / len(values)
            if worst is not None:
                metrics[f"{name}_worst"] = worst(values)
    return metrics
