"""What a card has, and what is said of plans near its limit."""

import pytest

from ordmoe_peft.tools.plan.card import GIB, Card


@pytest.mark.parametrize(("sold", "usable"), [(12, 11.7), (24, 23.6), (80, 79.2)])
def test_usable_memory_is_near_what_torch_reports(sold, usable):
    assert Card(sold).usable / GIB == pytest.approx(usable, rel=0.012)


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
