"""What a card has for training, from the size that it is sold as, and whether a plan fits.

What programs can have of a card that is sold as N GB, in GiB, is `0.99 N - 0.25`: driver and page tables keep the rest.
Held against what torch says in out-of-memory errors ("has a total capacity of … GiB") on Linux:

| sold as | rule | torch said | card, and where |
| --- | --- | --- | --- |
| 8 | 7.67 | 7.63 | RTX 4060, AIRI-Institute/HairFastGAN#8 |
| 12 | 11.63 | 11.75 | RTX 3060, Kunhao-Liu/StyleGaussian#12 |
| 16 | 15.59 | 15.61 | RTX A4000, DengKaiCQ/VGGT-Long#6 |
| 24 | 23.51 | 23.53; 23.61 | A30, google/RB-Modulation#5; RTX 4090, pinokiofactory/flux-webui#11 |
| 80 | 78.95 | 79.25 | A100, levihsu/OOTDiffusion#235 |

Cards that keep error correction in their own memory have a 16th less, so the rule is far off for them: torch said 14.56
of a T4 (16 GB, Zheng-Chong/CatVTON#133) and 44.53 of an L40S (48 GB, Wan-Video/Wan2.1#205). For these, and where the
card is at hand, give what `torch.cuda.mem_get_info()` says.

The reserve is for what is no tensor. CUDA's context and libraries took 0.46 GiB of the RTX 4090 above and 0.42 of an
RTX 6000 Ada (DINGYANB/MTVCrafter#21): what the process has, less what PyTorch reserved. The rest of it is for fragments
and for what kernels allocate inside. What a screen on the same card takes is not in it.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from ...errors import OrdMoEConfigError
from .plan import MemoryPlan, Traces, tokens_at_once
from .settings import PlanSettings
from .suggestions import Suggestion, fewest_changes, suggest


GIB = 2**30
# The rule above: a share of the size, and GiB that are gone whatever the size.
USABLE_SHARE, GONE_GB = 0.99, 0.25
# A plan this near to the limit may be on either side of it: fragments alone can be as much.
CLOSE_SHARE = 0.03
# GB/s from pinned RAM to the card, an assumption: PCIe 4.0 x16 has 31.5 by its standard.
COPY_GB_PER_S = 25.0


@dataclass(frozen=True)
class Card:
    """A card of the size that it is sold as, and what is to be left free on it.

    Raises:
        [`OrdMoEConfigError`]: a size that cannot be.
    """

    sold_gb: float
    usable_gb: float | None = field(
        default=None,
        metadata={
            "help": "GiB that programs can have of the card, where you know it: what `torch.cuda.mem_get_info()` gives "
            "second, by 2^30. By default 0.99 x gpu_memory_gb - 0.25; cards that keep error correction in their own "
            "memory, as T4 and L40S do, have a 16th less."
        },
    )
    reserve_gb: float = field(
        default=1.0,
        metadata={
            "help": "GiB to leave free: CUDA's context and libraries take some 0.5, fragments and what kernels "
            "allocate inside the rest. Give more where a screen is on the card, too."
        },
    )
    copy_gb_per_s: float = field(
        default=COPY_GB_PER_S,
        metadata={
            "help": "GB/s at which RAM is copied to the card, for experts in RAM: some 25 by PCIe 4.0 x16, half of "
            "that by x8 or by PCIe 3.0."
        },
    )

    def __post_init__(self):
        if not 0 < self.sold_gb < float("inf"):
            raise OrdMoEConfigError(f"gpu_memory_gb must be positive, got {self.sold_gb}.")
        if not 0 < self.copy_gb_per_s < float("inf"):
            raise OrdMoEConfigError(f"copy_gb_per_s must be positive, got {self.copy_gb_per_s}.")
        if self.usable_gb is not None and not 0 < self.usable_gb < float("inf"):
            raise OrdMoEConfigError(f"usable_gb must be positive, got {self.usable_gb}.")
        if not 0 <= self.reserve_gb * GIB < self.usable:
            raise OrdMoEConfigError(
                f"reserve_gb must be at least 0 and less than programs can have of the card, which of gpu_memory_gb="
                f"{self.sold_gb} is {max(self.usable, 0) / GIB:.2f} GiB, got {self.reserve_gb}. Where the card has "
                "more, give it as usable_gb."
            )

    @property
    def usable(self) -> int:
        """What programs can have of it, in bytes."""
        by_rule = USABLE_SHARE * self.sold_gb - GONE_GB
        return int(GIB * (by_rule if self.usable_gb is None else self.usable_gb))

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

    def copy_seconds(self, size: int) -> float:
        """How long `size` bytes take from pinned RAM to the card."""
        return size / 1e9 / self.copy_gb_per_s

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

    def way_of(way: Suggestion) -> dict[str, Any]:
        return {"options": way.options, **answered(way.plan)}

    at_once = tokens_at_once(plan, settings, card.room) if plan.total <= card.room else None
    traces = Traces()
    ways = [way_of(way) for way in suggest(config, settings, plan, card.safe_room, traces)]
    fewest = fewest_changes(config, settings, card.safe_room, traces) if ways else None
    of_card = {"usable": card.usable, "reserve": card.reserve, "room": card.room}
    return {
        **answered(plan),
        **of_card,
        "tokens_at_once": at_once,
        "suggestions": ways,
        "fewest": None if fewest is None else way_of(fewest),
    }
