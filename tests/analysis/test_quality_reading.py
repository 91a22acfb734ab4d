"""Each failure signature is named when its figures show it, and not otherwise."""

import pytest

from ordmoe_peft.analysis.correlation import RankCorrelation
from ordmoe_peft.analysis.quality import OrderShare, QualityCorrelation, TierMeans, TierQuality
from ordmoe_peft.analysis.quality_reading import is_above, orders_below_top, read_quality


HELD, CHANCE_LEVEL = 0.9, 0.5


def quality(ends=HELD, ends_no_eos=HELD, full=HELD, full_no_eos=HELD, rho=0.5, cosine=0.1, note=None, tiers=3):
    """Figures with a standard error of 0.02 throughout; random groups have the full order on half of all samples."""
    return TierQuality(
        model="model",
        num_samples=400,
        num_tiers=tiers,
        grouping="uniform",
        tiers=[TierMeans(tier, -tier, -tier, {"overall": 1 / tier}, {"overall": 400}) for tier in range(1, tiers + 1)],
        order={
            "ends": OrderShare(ends, 0.02, 0.5, 0.9, 0.02),
            "ends_no_eos": OrderShare(ends_no_eos, 0.02, 0.5, 0.9, 0.02),
            "full": OrderShare(full, 0.02, 1 / 6, 0.5, 0.02),
            "full_no_eos": OrderShare(full_no_eos, 0.02, 1 / 6, 0.5, 0.02),
        },
        spearman=QualityCorrelation(
            RankCorrelation(rho, [rho], 0.05), RankCorrelation(None, [None], None), "exact match", note
        ),
        diversity=[[0.1] * (tiers - 1) + [cosine], [None] * tiers],
        texts=[],
    )


SIGNATURES = {
    "no signal": ({"ends": 0.53}, "there is no signal to train on"),
    "ends by the end token": (
        {"ends_no_eos": CHANCE_LEVEL},
        "only through the end-of-sequence token: without it on 50.0",
    ),
    "random level": ({"full": 0.55}, "no better ordered than random groups"),
    "middle by the end token": (
        {"full_no_eos": CHANCE_LEVEL},
        "middle over bottom only through the end-of-sequence token: without it on 50.0 ± 2.0 %",
    ),
    "alike experts": ({"cosine": 0.95}, "experts of tier 3 say nearly the same in MoE layers [0]"),
    "correlation in the noise": ({"rho": -0.09}, "no more than noise"),
    "no correlation": (
        {"rho": None, "note": "The rating is 4."},
        "were not correlated with exact match. The rating is 4.",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), SIGNATURES.values(), ids=SIGNATURES)
def test_signatures(changes, sentence):
    assert sentence in "\n".join(read_quality(quality(**changes)))
    assert sentence not in "\n".join(read_quality(quality()))


def test_a_healthy_model():
    ends, full, answers, correlation = read_quality(quality())
    assert ends.startswith("Tier 1 is likelier than tier 3 on 90.0 ± 2.0 % of samples")
    assert "chance 16.7 %, random groups 50.0 %" in full
    assert "100.0 %, 50.0 %, 33.3 %" in answers
    assert "more than noise" in correlation


def test_two_tiers_have_no_middle():
    assert not any("in order" in sentence for sentence in read_quality(quality(tiers=2)))


def test_noise_counts_both_standard_errors():
    """0.05 is 2.5 standard errors of 0.02, but 1.8 of √(0.02² + 0.02²)."""
    share = OrderShare(0.55, 0.02, 0.5)
    assert is_above(share, 0.5)
    assert not is_above(share, 0.5, 0.02)


def test_means_against_the_order_are_named_with_their_figures():
    swapped = quality()
    swapped.tiers[1].log_likelihood_no_eos, swapped.tiers[2].log_likelihood_no_eos = -1.5, -1.25
    wanted = (
        "On average tier 3 is likelier than tier 2 without end-of-sequence tokens, against the order: -1.250 against"
    )
    assert [sentence for sentence in read_quality(swapped) if "On average" in sentence] == [
        f"{wanted} -1.500 nats per token."
    ]


def test_without_random_groups_the_tiers_below_an_ever_likelier_first_are_the_measure():
    """Three tiers with the first always on top are in order on half of all samples by chance, not on a sixth."""
    assert not orders_below_top(OrderShare(0.53, 0.02, 1 / 6), num_tiers=3)
    assert orders_below_top(OrderShare(0.55, 0.02, 1 / 6), num_tiers=3)
