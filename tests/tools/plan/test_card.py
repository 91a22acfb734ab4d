"""What a card has, and what is said of plans near its limit."""

import pytest

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.plan.card import GIB, Card


@pytest.mark.parametrize(
    ("sold", "usable"), [(8, 7.63), (12, 11.75), (16, 15.61), (24, 23.53), (24, 23.61), (80, 79.25)]
)
def test_usable_memory_is_near_what_torch_reports(sold, usable):
    assert Card(sold).usable / GIB == pytest.approx(usable, rel=0.012)


def test_what_is_known_of_the_card_counts():
    l40s = Card(48, usable_gb=44.5)
    assert l40s.usable == 44.5 * GIB
    assert l40s.room == 43.5 * GIB


def test_copies_take_their_bytes_over_the_rate():
    assert Card(24).copy_seconds(50 * 10**9) == 2
    assert Card(24, copy_gb_per_s=12.5).copy_seconds(50 * 10**9) == 4


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.9, "fits"), (0.98, "fits, but within 3 % of the limit"), (1.0, "fits, but within 3 % of the limit")],
)
def test_verdict(share, verdict):
    """Shares are of what is usable, reserve and all."""
    card = Card(24, reserve_gb=1)
    total = int(share * card.usable) - card.reserve
    assert card.verdict(total) == verdict
    assert card.answer(total)["fits"]
    assert card.verdict(card.room + 1) == "does not fit"
    assert card.answer(card.room + 1) == {"fits": False, "is_close": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sold_gb": 0}, "gpu_memory_gb must be positive, got 0"),
        ({"sold_gb": 0.2, "reserve_gb": 0}, "of gpu_memory_gb=0.2 is 0.00 GiB, got 0. Where the card has more"),
        ({"sold_gb": 24, "reserve_gb": 23.6}, "is 23.51 GiB, got 23.6"),
        ({"sold_gb": 24, "usable_gb": -1}, "usable_gb must be positive, got -1"),
        ({"sold_gb": 24, "copy_gb_per_s": 0}, "copy_gb_per_s must be positive, got 0"),
    ],
)
def test_cards_that_cannot_be(settings, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        Card(**settings)
