import pytest
import torch

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tiers.ranking import check_tiers_fit, first_rank, random_order, rank_experts, ranks_of_tiers
from tests import reference


def ranks(tier, num_tiers, num_experts, top_k, grouping):
    first = first_rank(tier, num_tiers, num_experts, top_k, grouping)
    return list(range(first, first + top_k))


def test_the_methods_own_examples():
    """METHOD: E = 64, K = 6, C = 3."""
    uniform = [ranks(tier, 3, 64, 6, "uniform") for tier in (1, 2, 3)]
    assert [(tier[0], tier[-1]) for tier in uniform] == [(1, 6), (30, 35), (59, 64)]
    high_only = [ranks(tier, 3, 64, 6, "high_only") for tier in (1, 2, 3)]
    assert [(tier[0], tier[-1]) for tier in high_only] == [(1, 6), (7, 12), (13, 18)]


@pytest.mark.parametrize("grouping", ["uniform", "high_only"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 6), (16, 2), (8, 2), (9, 2), (128, 8), (8, 1)])
@pytest.mark.parametrize("num_tiers", [1, 2, 3, 4])
def test_tiers_are_disjoint_and_as_the_reference_says(num_tiers, num_experts, top_k, grouping):
    tiers = [ranks(tier, num_tiers, num_experts, top_k, grouping) for tier in range(1, num_tiers + 1)]
    assert tiers == [
        reference.tier_ranks(tier, num_tiers, num_experts, top_k, grouping) for tier in range(1, num_tiers + 1)
    ]
    everything = [rank for tier in tiers for rank in tier]
    assert len(set(everything)) == len(everything)
    assert min(everything) == 1
    assert max(everything) <= num_experts


def test_too_many_tiers_are_refused_with_the_numbers():
    with pytest.raises(OrdMoEConfigError, match=r"num_tiers=5 .*layer 3.*K=2.*E=9.*largest num_tiers that fits is 4"):
        check_tiers_fit(5, 9, 2, "layer 3")
    check_tiers_fit(4, 9, 2, "layer 3")


def test_ranking_is_by_score_after_the_routers_own_choice():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.3, 0.1, 0.1, 0.1]])
    # In the second row experts 1, 2 and 3 tie; the router took 3, and the rest follow by index.
    chosen = torch.tensor([[1, 3], [0, 3]])
    assert rank_experts(scores, chosen).tolist() == [[1, 3, 2, 0], [0, 3, 1, 2]]


def test_ranks_end_with_the_groups_that_were_kept_where_these_are_enough():
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3, 0.7]])
    left_out = torch.tensor([[False, False, True, True, False, False]])
    chosen = torch.tensor([[0]])
    assert rank_experts(scores, chosen, left_out, num_needed=4).tolist() == [[0, 5, 4, 1]]
    assert rank_experts(scores, chosen, left_out, num_needed=5).tolist() == [[0, 2, 5, 4, 3, 1]]


def test_each_token_has_its_own_tiers_ranks():
    ranked = torch.tensor([[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
    assert ranked.gather(1, ranks_of_tiers(torch.tensor([1, 3]), 3, 5, 1, "uniform")).tolist() == [[4], [4]]
    assert ranked.gather(1, ranks_of_tiers(torch.tensor([2, 2]), 2, 5, 2, "high_only")).tolist() == [[2, 1], [2, 3]]


class TestRandomOrder:
    tokens = 4000
    ranked = torch.arange(6).expand(tokens, 6)
    rows, positions = torch.arange(tokens) // 50, torch.arange(tokens) % 50

    def draw(self, **changes):
        arguments = {"row_T": self.rows, "position_T": self.positions, "seed": 0, "step": 0, "layer": 0} | changes
        return random_order(self.ranked, 2, **arguments)

    def test_keeps_the_top_and_permutes_the_rest(self):
        drawn = self.draw()
        assert torch.equal(drawn[:, :2], self.ranked[:, :2])
        assert torch.equal(drawn.sort(dim=1).values, self.ranked)

    def test_is_uniform(self):
        """Each of 4 experts comes third with probability ¼: 1,000 of 4,000, standard deviation 27."""
        counts = torch.bincount(self.draw()[:, 2], minlength=6)[2:]
        assert ((counts - 1000).abs() < 140).all()

    def test_repeats_for_the_same_key_and_differs_for_another(self):
        assert torch.equal(self.draw(), self.draw())
        for change in ({"seed": 1}, {"step": 1}, {"layer": 1}, {"row_T": self.rows + 1}):
            assert (self.draw(**change)[:, 2] == self.draw()[:, 2]).float().mean() < 0.35

    def test_a_token_draws_the_same_alone(self):
        alone = random_order(self.ranked[:1], 2, self.rows[777:778], self.positions[777:778], 0, 0, 0)
        assert torch.equal(alone[0], self.draw()[777])
