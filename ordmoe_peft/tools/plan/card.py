"""What a card has for training, from the size that it is sold as, and whether a plan fits."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from ...errors import OrdMoEConfigError
from .plan import MemoryPlan, tokens_at_once
from .settings import PlanSettings
from .suggestions import suggest


GIB = 2**30
# What programs can have of the size in a card's name: torch reports 23.6 GiB of RTX 3090 and 4090 (24 GB), 11.7 of an
# RTX 3060 (12 GB) and 79.2 of an A100 (80 GB).
USABLE_SHARE = 0.98
# A plan this near to the limit may be on either side of it: fragments alone can be as much.
CLOSE_SHARE = 0.03


@dataclass(frozen=True)
class Card:
    """A card of the size that it is sold as, and what is to be left free on it.

    Raises:
        [`OrdMoEConfigError`]: a size that cannot be.
    """

    sold_gb: float
    reserve_gb: float = field(
        default=1.0,
        metadata={
            "help": "GiB to leave free: CUDA's context and libraries take some 0.5, fragments and what kernels "
            "allocate inside the rest."
        },
    )

    def __post_init__(self):
        if not 0 < self.sold_gb < float("inf"):
            raise OrdMoEConfigError(f"gpu_memory_gb must be positive, got {self.sold_gb}.")
        if not 0 <= self.reserve_gb * GIB < self.usable:
            raise OrdMoEConfigError(
                f"reserve_gb must be at least 0 and less than gpu_memory_gb={self.sold_gb} leaves to programs, "
                f"{self.usable / GIB:.2f} GiB, got {self.reserve_gb}."
            )

    @property
    def usable(self) -> int:
        """What programs can have of it, in bytes."""
        return int(self.sold_gb * USABLE_SHARE * GIB)

    @property
    def reserve(self) -> int:
        """What is left free, in bytes."""
        return int(self.reserve_gb * GIB)

    @property
    def room(self) -> int:
        """What training's tensors can have, in bytes."""
        return self.usable - self.reserve

    @property
    def safe_room(self) -> int:
        """The same without the last [`CLOSE_SHARE`] of what is usable."""
        return int(self.usable * (1 - CLOSE_SHARE)) - self.reserve

    def answer(self, total: int) -> dict[str, bool]:
        """Whether `total` bytes of tensors fit, and whether that is too close to be sure, as plain data."""
        return {"fits": total <= self.room, "is_close": self.safe_room < total <= self.room}

    def verdict(self, total: int) -> str:
        """The same in words."""
        answer = self.answer(total)
        if answer["is_close"]:
            return f"fits, but within {100 * CLOSE_SHARE:g} % of the limit"
        return "fits" if answer["fits"] else "does not fit"


def fit_to_card(config: PretrainedConfig, settings: PlanSettings, plan: MemoryPlan, card: Card) -> dict[str, Any]:
    """Whether the `plan` of a model of `config` fits, and what would make it fit, as plain data, sizes in bytes."""

    def answered(plan: MemoryPlan) -> dict[str, Any]:
        return {**plan.to_dict(), **card.answer(plan.total)}

    at_once = tokens_at_once(plan, settings, card.room) if plan.total <= card.room else None
    ways = [{"options": way.options, **answered(way.plan)} for way in suggest(config, settings, plan, card.safe_room)]
    of_card = {"usable": card.usable, "reserve": card.reserve, "room": card.room}
    return {**answered(plan), **of_card, "tokens_at_once": at_once, "suggestions": ways}
