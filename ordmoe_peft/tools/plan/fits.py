"""Which models fit which cards, as they are or with which options."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
from transformers import PretrainedConfig

from ..tables import Table, number, plain
from .card import CLOSE_SHARE, GIB, Card
from .plan import ExpertsInRam, Traces, plan_memory
from .settings import PlanSettings
from .suggestions import Suggestion, fewest_changes


FITS, NO = "fits", "no"


@dataclass(frozen=True)
class ModelFits:
    """What makes training one model fit some cards.

    Args:
        name (`str`): the model.
        cards (`Sequence` of [`~ordmoe_peft.tools.plan.card.Card`]): which cards.
        total (`int`): what training takes as it is, in bytes.
        in_ram ([`~ordmoe_peft.tools.plan.plan.ExpertsInRam`], *optional*): its packed experts, were they in RAM.
        ways (`list` of [`~ordmoe_peft.tools.plan.suggestions.Suggestion`]): for each card the fewest changes with which
            it fits, `None` where no options suffice.
    """

    name: str
    cards: Sequence[Card]
    total: int
    in_ram: ExpertsInRam | None
    ways: list[Suggestion | None]

    def cells(self) -> list[str]:
        """For each card what the table says."""
        return [NO if way is None else way.options or FITS for way in self.ways]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, sizes in bytes."""
        cards = [
            {"sold_gb": card.sold_gb, "usable": card.usable, "reserve": card.reserve, "fits": way is not None}
            | ({} if way is None else {"options": way.options, **way.plan.to_dict()})
            for card, way in zip(self.cards, self.ways, strict=True)
        ]
        in_ram = None if self.in_ram is None else vars(self.in_ram)
        return {"model": self.name, "total": self.total, "experts_in_ram": in_ram, "cards": cards}


def find_fits(name: str, config: PretrainedConfig, settings: PlanSettings, cards: Sequence[Card]) -> ModelFits:
    """What makes training a model of `config` fit each of `cards`, with a little to spare.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: see [`~ordmoe_peft.tools.plan.plan.plan_memory`].
    """
    traces, in_ram = Traces(), None
    if settings.quantization is not None:
        in_ram = plan_memory(config, settings.with_quantization(offload_experts=True), traces).in_ram
    return ModelFits(
        name,
        cards,
        total=plan_memory(config, settings, traces).total,
        in_ram=in_ram,
        ways=[fewest_changes(config, replace(settings, usable=card.usable), card.safe_room, traces) for card in cards],
    )


def fits_table(fits: Sequence[ModelFits], step: str) -> Table:
    """A row for each model, a column for each card.

    Args:
        fits (`Sequence` of [`ModelFits`]): of the same cards.
        step (`str`): how models are trained, in words.
    """
    (cards, *_) = (model.cards for model in fits)
    rows = [
        [model.name, model.total + cards[0].reserve, *model.cells(), *_ram(model.in_ram, cards[0])] for model in fits
    ]
    sizes = [f"{card.sold_gb:g} GB" for card in cards]
    needs, ram, copies = "needs, GiB", "offload: RAM, GiB", "copies, s"
    return Table(
        f"What makes training fit a card: {step}",
        pd.DataFrame(rows, columns=["model", needs, *sizes, ram, copies]),
        {needs: _gib, ram: _gib, copies: partial(number, digits=1)},
        f"{FITS!r}: as it is. Options: the fewest to add to `ordmoe train`. {NO!r}: not with all that are known. "
        f"{100 * CLOSE_SHARE:g} % of what programs can have of a card stay free, and a reserve of "
        f"{_gib(cards[0].reserve)} GiB. With --offload_experts true, packed experts take pinned RAM, and a forward "
        f"with its backward copies them at an assumed {cards[0].copy_gb_per_s:g} GB/s, in part while the card works.",
    )


def _ram(in_ram: ExpertsInRam | None, card: Card) -> list[float | None]:
    return [None, None] if in_ram is None else [in_ram.pinned, card.copy_seconds(in_ram.copied)]


def _gib(size: Any) -> str:
    return plain(None) if size is None or size != size else f"{size / GIB:.2f}"
