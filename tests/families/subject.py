"""A row's tiny model, with what tests do to it."""

import copy
from contextlib import nullcontext
from functools import cached_property

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ordmoe_peft import OrdMoEConfig, tier_routing
from tests.families import tiny
from tests.families.rows import Row
from tests.models import randomize_adapter


class Subject:
    """The model of a row. Each test works on a copy.

    Attributes:
        model (`PreTrainedModel`): untouched, frozen, in evaluation mode.
        batch (`dict`): three rows of inputs.
    """

    def __init__(self, row: Row):
        self.row = row
        config = tiny.tiny_config(row.config_class, row.changes)
        self.model = self.mended(tiny.tiny_model(row.model_class, config).requires_grad_(False))
        self.batch = tiny.tiny_batch(self.model, row.media)

    def mended(self, model: nn.Module) -> nn.Module:
        if self.row.mend is not None:
            self.row.mend(model)
        return model

    @cached_property
    def plain(self) -> torch.Tensor:
        """The untouched model's logits (`torch.Tensor` of shape `(3, S, V)`)."""
        plain = self.logits(self.model)
        assert plain.isfinite().all()
        return plain

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.batch).logits

    def adapted(
        self, model: nn.Module | None = None, random: bool = True, targets: list[str] | None = None
    ) -> PeftModel:
        """With an adapter whose alpha / r is no power of two, which would make sums exact by luck."""
        torch.manual_seed(3)
        config = OrdMoEConfig(r=4, lora_alpha=6, targets=targets or self.row.targets)
        adapted = get_peft_model(self.copy() if model is None else model, config).eval()
        if random:
            randomize_adapter(adapted)
        return adapted

    def gradients(self, model: PeftModel, tier: list[int] | None) -> dict[str, torch.Tensor]:
        """The factors' gradients of a random sum of logits with the rows on tiers, by name."""
        model.zero_grad()
        model.train()
        torch.manual_seed(7)  # for routers that draw
        with tier_routing(model, tier) if tier else nullcontext():
            logits = model(**self.batch, use_cache=False).logits
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
        model.eval()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    assert got.isfinite().all()
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()
