"""What leaving out LoRA on routers changes in routing, measured before it is left out."""

from dataclasses import dataclass
from statistics import fmean

import torch
from peft import PeftModel

from ...errors import OrdMoEModelError
from ...monitoring.router_meter import RouterMeter


PROBE_TEXTS = (
    "The capital of France is Paris, and its longest river is the Loire.",
    "def add(a, b):\n    return a + b",
    "Question: A train travels 60 km in 45 minutes. What is its average speed in km/h?\nAnswer: 80",
)


@dataclass(frozen=True)
class RoutingChange:
    """How routing with LoRA on the routers and without differ, on the same hidden states, those of the adapted model.

    Args:
        layers (`list` of `(name, overlap, kl)`): MoE layer, share of its K experts that both choose, and KL(without ‖
            with) of the softmax of their scores, in nats: means over tokens.
        num_tokens (`int`): the tokens.
        unmeasured (`dict[str, str]`): layers whose routers cannot be read, and why.
    """

    layers: list[tuple[str, float, float]]
    num_tokens: int
    unmeasured: dict[str, str]

    @property
    def mean(self) -> tuple[float, float]:
        """Overlap and KL, over layers."""
        return fmean(overlap for _, overlap, _ in self.layers), fmean(kl for _, _, kl in self.layers)


@torch.no_grad()
def measure_routing_change(model: PeftModel, token_ids: list[list[int]]) -> RoutingChange:
    """Run `model`, with the adapter active, on sequences of tokens, one at a time.

    Raises:
        [`OrdMoEModelError`]: no router with LoRA can be read.
    """
    meter = RouterMeter(model.eval())
    with meter:
        for ids in token_ids:
            model(input_ids=torch.tensor([ids], device=model.device))
    report = [layer for layer in meter.report() if layer.drift_overlap is not None]
    unmeasured = meter.unsupported | meter.unread
    if not report:
        raise OrdMoEModelError(
            f"No router with LoRA on it can be read: {unmeasured or 'none has LoRA'}. Fold the routers "
            "(--router fold) instead of dropping their update."
        )
    layers = [(layer.name, layer.drift_overlap or 0.0, layer.drift_kl or 0.0) for layer in report]
    return RoutingChange(layers, report[0].num_tokens, unmeasured)
