from ordmoe_peft.tools.measure.correlation import QualityCorrelation, RankCorrelation
from ordmoe_peft.tools.measure.evaluation import TierMeans
from ordmoe_peft.tools.measure.quality import ORDERS, OrderShare
from ordmoe_peft.tools.report import tiers_report
from tests.tools.report.pages import Page, quality


def test_the_page_has_numbers_and_texts(tmp_path, undrawn):
    words = Page(tiers_report(quality(), tmp_path)).text
    assert "tier color shape presence overall log-likelihood without end tokens" in words
    assert "1 90.0 % 80.0 % 91.7 % -0.050 -0.150" in words
    assert "all tiers in order 83.4 % 1.2 % 17.1 % 2.0 % 16.7 %" in words
    assert "routing scores with exact match" in words
    assert "overall +0.123 — — — — Standard error of rho" in words
    assert "One layer had no variation." in words
    assert "prompt reference tier 1 tier 2 tier 3 Which shape? circle a circle" in words


def test_what_is_missing_is_left_out(tmp_path):
    """One tier, no random groups, no variation, one expert a token, no texts, likelihoods that are no numbers."""
    empty = RankCorrelation(None, [None, None], None)
    poor = quality(
        2,
        1,
        tiers=[TierMeans(1, {"overall": float("nan")}, log_likelihood=-1.0)],
        spearman=QualityCorrelation(empty, empty, "rating", None),
        diversity=[[None], [None]],
        order=dict.fromkeys(ORDERS, OrderShare(1.0, 0.0, 1.0)),
        texts=[],
    )
    path = tiers_report(poor, tmp_path)
    assert {file.stem for file in path.parent.glob("*.png")} == {"likelihood", "order"}
    words = Page(path).text
    assert "1 — -1.000 —" in words
    assert "all tiers in order 100.0 % 0.0 % — — 100.0 %" in words
    assert "Texts side by side" not in words
