"""Statistics of routers against figures worked out by hand."""

import math

import pytest
import torch

from ordmoe_peft.monitoring.health import column_widths, drift_columns, layer_health, routing_columns, tier_columns


def health(columns, num_experts, top_k):
    sums = {name: values.double().sum(0).tolist() for name, values in columns.items()}
    num_tiers = len(sums.get("gate_mass", []))
    assert {name: len(values) for name, values in sums.items()} == column_widths(num_experts, num_tiers, False)
    return layer_health(0, "mlp", num_experts, top_k, sums)


def test_utilisation_is_relative_to_the_fair_share():
    """3 tokens choose 2 of 4 experts: 0 three times, 1 twice, 2 once, 3 never. The fair share is 3 · 2/4 = 1.5."""
    layer = health(routing_columns(torch.zeros(3, 4), torch.tensor([[0, 1], [1, 0], [0, 2]])), 4, 2)
    assert layer.num_tokens == 3
    assert layer.utilisation == pytest.approx([2, 4 / 3, 2 / 3, 0])
    assert layer.dead == 1
    assert layer.imbalance == pytest.approx(2)
    assert layer.variation == pytest.approx(math.sqrt((1 + 1 / 9 + 1 / 9 + 1) / 4))


def test_an_expert_below_one_percent_of_the_fair_share_is_dead():
    """K/E = 1/2, so of 1,000 tokens 500 are fair: 5 are alive, 4 are not."""
    for used, dead in ((5, 0), (4, 1)):
        index = torch.tensor([[0]] * (1000 - used) + [[1]] * used)
        assert health(routing_columns(torch.zeros(1000, 2), index), 2, 1).dead == dead


def test_entropy_of_the_mean_is_apart_from_the_mean_entropy():
    """Two sure tokens on different experts of four: each is certain, together they use two, ln 2 / ln 4."""
    sure = torch.tensor([[50.0, 0, 0, 0], [0, 50.0, 0, 0]])
    layer = health(routing_columns(sure, torch.tensor([[0], [1]])), 4, 1)
    assert layer.token_entropy == pytest.approx(0, abs=1e-6)
    assert layer.marginal_entropy == pytest.approx(0.5)
    flat = health(routing_columns(torch.zeros(2, 4), torch.tensor([[0], [1]])), 4, 1)
    assert flat.token_entropy == pytest.approx(1)
    assert flat.marginal_entropy == pytest.approx(1)


def test_score_std_is_over_experts_within_a_token():
    """(1, −1, 1, −1) has a deviation of 1, (7, 7, 7, 7) none, so the mean is a half, whatever tokens differ by."""
    logits = torch.tensor([[1.0, -1, 1, -1], [7.0, 7, 7, 7]])
    assert health(routing_columns(logits, torch.tensor([[0], [0]])), 4, 1).score_std == pytest.approx(0.5)


def test_gate_mass_is_what_the_router_gives_and_probability_what_softmax_does():
    """Probabilities 1/2, 1/4, 1/8, 1/8 in tiers of two: 3/4 and 1/4."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    index = [torch.tensor([[0, 1]]), torch.tensor([[2, 3]])]
    weights = [torch.tensor([[0.6, 0.4]]), torch.tensor([[0.2, 0.1]])]
    layer = health(routing_columns(logits, index[0]) | tier_columns(logits, weights, index), 4, 2)
    assert layer.gate_mass == pytest.approx([1, 0.3])
    assert layer.tier_probability == pytest.approx([0.75, 0.25])
    assert layer.drift_overlap is None


def test_drift_by_hand():
    """Base (3/4, 1/4), adapted (1/4, 3/4): KL = 3/4 ln 3 − 1/4 ln 3 = ½ ln 3. Experts {0, 1} became {1, 2}: a half."""
    base, adapted = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    columns = drift_columns(adapted, torch.tensor([[1, 2]]), base, torch.tensor([[0, 1]]))
    assert columns["drift_overlap"].item() == pytest.approx(0.5)
    assert columns["drift_kl"].item() == pytest.approx(0.5 * math.log(3))


def test_a_layer_without_tokens_has_no_health():
    sums = {name: [0.0] * width for name, width in column_widths(2, 0, False).items()}
    assert layer_health(0, "mlp", 2, 1, sums) is None
