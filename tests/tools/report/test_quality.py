import pytest

from ordmoe_peft.tools.measure.correlation import QualityCorrelation, RankCorrelation
from ordmoe_peft.tools.measure.quality import ORDERS, OrderShare, TierMeansByClass
from ordmoe_peft.tools.report import tiers_report
from tests.tools.report.pages import Page, quality


def test_the_page_has_numbers_and_texts(tmp_path, undrawn):
    words = Page(tiers_report(quality(), tmp_path)).text
    assert (
        "tier color shape presence overall log-likelihood without end tokens confident tokens fragile tokens" in words
    )
    assert "1 90.0 % 80.0 % 91.7 % -0.050 -0.150 -0.040 -2.250" in words
    assert "75.0 % of 4,321 tokens are confident" in words
    assert "all tiers in order 83.4 % 1.2 % 17.1 % 2.0 % 16.7 % 987" in words
    assert "below tier 1, fragile tokens 83.4 %" in words
    assert "only the tiers below it are compared" in words
    assert "routing scores with exact match" in words
    assert "overall +0.123 — — — — Standard error of rho" in words
    assert "One layer had no variation." in words
    assert "prompt reference tier 1 tier 2 tier 3 Which shape? circle a circle" in words


def test_what_is_missing_is_left_out(tmp_path):
    """One tier, no random groups, no variation, one expert a token, no texts, no fragile tokens, no numbers."""
    empty = RankCorrelation(None, [None, None], None)
    poor = quality(
        2,
        1,
        tiers=[TierMeansByClass(1, {"overall": float("nan")}, log_likelihood=-1.0)],
        spearman=QualityCorrelation(empty, empty, "rating", None),
        diversity=[[None], [None]],
        order={
            key: OrderShare(None, None, 1.0, num_samples=0)
            if "fragile" in key
            else OrderShare(1.0, 0.0, 1.0, num_samples=9)
            for key in ORDERS
        },
        texts=[],
    )
    path = tiers_report(poor, tmp_path)
    assert {file.stem for file in path.parent.glob("*.png")} == {"likelihood", "order"}
    words = Page(path).text
    assert "1 — -1.000 — — —" in words
    assert "all tiers in order 100.0 % 0.0 % — — 100.0 % 9" in words
    assert "below tier 1, fragile tokens — — — — 100.0 % 0" in words
    (alt,) = [image["alt"] for image in Page(path).all("img") if "in order" in image["alt"]]
    assert "confident tokens 100.0 %" in alt and "fragile" not in alt
    assert "Texts side by side" not in words


@pytest.mark.parametrize("num_samples", [0, 9])
def test_two_tiers_have_none_below_the_first_and_no_samples_no_plot(tmp_path, undrawn, num_samples):
    share = 1.0 if num_samples else None
    order = {key: OrderShare(share, share, 0.5, num_samples=num_samples) for key in ORDERS if "below" not in key}
    path = tiers_report(quality(num_tiers=2, order=order), tmp_path)
    words = Page(path).text
    assert "first over last, without end tokens" in words
    assert "below tier 1, " not in words
    assert any("in order" in image["alt"] for image in Page(path).all("img")) == bool(num_samples)
