import math

import pytest
import torch

from ordmoe_peft.errors import OrdMoEDataError
from ordmoe_peft.tools.measure.correlation import (
    average_ranks,
    quality_correlation,
    rank_correlation,
    routing_score,
    sample_ratings,
    spearman,
)
from ordmoe_peft.tools.measure.evaluation import TierItems, TierResult
from tests import text


def test_equal_values_share_the_mean_of_their_ranks():
    """Sorted: 5 (rank 1), 10 (2), then 20 three times (3, 4, 5: mean 4)."""
    assert average_ranks(torch.tensor([20.0, 5.0, 20.0, 10.0, 20.0])).tolist() == [4, 1, 4, 2, 4]


def test_spearman_without_ties():
    """ρ = 1 − 6 Σd² / (n(n² − 1)), d = (1, −1, 1, −1, 0): 1 − 24/120; only the order of values counts."""
    x = torch.tensor([-7.0, 0.0, 0.5, 100.0, 101.0])
    assert spearman(x, torch.tensor([2.0, 1, 4, 3, 5])) == pytest.approx(0.8)
    assert spearman(x, -(x**3)) == pytest.approx(-1)


def test_spearman_with_ties():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, squared norms 4.5 and 5."""
    got = spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4]))
    assert got == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_with_two_values():
    """Ranks 1.5, 1.5, 3.5, 3.5 against 1, 3, 2, 4: covariance 2, squared norms 4 and 5."""
    assert spearman(torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(2 / math.sqrt(20))


def test_nothing_correlates_with_a_constant():
    x, constant = torch.arange(4.0), torch.ones(4)
    assert spearman(x, constant) is None
    assert spearman(constant, x) is None


def test_routing_score_by_hand():
    """Two samples of two positions, E = 2; uniform logits give ln ½, logits (ln 3, 0) give ln ¾ and ln ¼.

    The first sample's response comes from both positions: K = 1 chose ¾ and ½. The second's from its last alone: ¼.
    """
    logits = torch.tensor([[math.log(3), 0], [0, 0], [5, -5], [math.log(3), 0]])
    index = torch.tensor([[0], [0], [0], [1]])
    predicts = torch.tensor([[True, True], [False, True]])
    wanted = [(math.log(3 / 4) + math.log(1 / 2)) / 2, math.log(1 / 4)]
    assert routing_score(logits, index, predicts).tolist() == pytest.approx(wanted)


def test_routing_score_is_the_mean_over_the_chosen_experts():
    """ln ¾ and ln ¼ for K = 2."""
    got = routing_score(torch.tensor([[math.log(3), 0]]), torch.tensor([[1, 0]]), torch.tensor([[True]]))
    assert got.item() == pytest.approx((math.log(3 / 4) + math.log(1 / 4)) / 2)


def test_overall_is_of_the_mean_over_layers():
    """Layer 0 agrees with quality, layer 1 disagrees and is larger, so their mean disagrees too."""
    quality = torch.tensor([1.0, 2, 3])
    scores = torch.stack([quality, -10 * quality, torch.zeros(3)], dim=1)
    found = rank_correlation(scores, quality)
    assert found.layers == [pytest.approx(1), pytest.approx(-1), None]
    assert found.overall == pytest.approx(-1)
    assert found.stderr == pytest.approx(1 / math.sqrt(2))


class TestQualityCorrelation:
    SCORES = [torch.tensor([[-1.0], [-2], [-3]]), torch.tensor([[-4.0], [-5], [-6]])]

    def results(self, top=(True, False, False), bottom=(False, False, False)):
        likelihoods = ([-0.1, -0.2, -0.3], [-1.0, -3, -2])
        return [
            TierResult(tier, items=TierItems(["a"] * 3, list(right), likelihood, likelihood))
            for tier, right, likelihood in zip((1, 2), (top, bottom), likelihoods, strict=True)
        ]

    def test_exact_match(self):
        """Within tier 1, ranks 3, 2, 1 against 3, 1.5, 1.5: 1.5 / √(2 · 1.5).

        Pooled, ranks 6…1 against 6 and five times 3: 2.5 · 3 / √(17.5 · 7.5).
        """
        found = quality_correlation(self.results(), self.SCORES, None)
        assert (found.quality, found.note) == ("exact match", None)
        assert found.within_top.overall == pytest.approx(1.5 / math.sqrt(3))
        assert found.within_top.layers == [pytest.approx(1.5 / math.sqrt(3))]
        assert found.pooled.overall == pytest.approx(7.5 / math.sqrt(17.5 * 7.5))
        assert found.pooled.stderr is None

    @pytest.mark.parametrize(("right", "word"), [(True, "All"), (False, "None")])
    def test_likelihood_where_answers_do_not_tell_samples_apart(self, right, word):
        """Tier 1's likelihoods fall with its scores; of the six pooled, two neighbours are swapped: 1 − 6·2/210."""
        found = quality_correlation(self.results(top=[right] * 3), self.SCORES, None)
        assert found.quality == "mean log-likelihood"
        assert found.note.startswith(f"{word} of tier 1's answers match")
        assert found.within_top.overall == pytest.approx(1)
        assert found.pooled.overall == pytest.approx(1 - 12 / 210)

    def test_ratings_are_not_pooled(self):
        found = quality_correlation(self.results(), self.SCORES, torch.tensor([1.0, 2, 3]))
        assert found.quality == "rating"
        assert found.within_top.overall == pytest.approx(-1)
        assert found.pooled.overall is None
        assert found.pooled.layers == [None]
        assert "not pooled" in found.note

    def test_a_constant_gives_a_reason_instead_of_a_number(self):
        found = quality_correlation(self.results(), self.SCORES, torch.tensor([4.0, 4, 4]))
        assert found.within_top.overall is None
        assert "The rating is 4 for every sample" in found.note
        flat = quality_correlation(self.results(), [torch.zeros(3, 2), torch.ones(3, 2)], None)
        assert flat.within_top.layers == [None, None]
        assert "the same for every sample in MoE layers [0, 1]" in flat.note


@pytest.mark.parametrize("ratings", [["good", "bad", "good"], [1.0, None, 2.0], [1.0, float("nan"), 2.0]])
def test_ratings_that_are_not_numbers(ratings):
    dataset = text.conversations(3).add_column("stars", ratings)
    with pytest.raises(OrdMoEDataError, match="finite number in each row; row"):
        sample_ratings(dataset, "stars")
