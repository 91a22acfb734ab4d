"""The losses as functions of scores, without a model."""

from types import SimpleNamespace

import pytest
import torch

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.objectives.advantages import tier_advantages
from ordmoe_peft.objectives.registry import OBJECTIVES
from ordmoe_peft.router_output import RouterOutput
from ordmoe_peft.training.losses import TierLoss, mean_balance_loss, means_over_processes, tier_metrics
from ordmoe_peft.training.tier_scores import TierScores


LABELS = torch.tensor([[5, 6, 2], [7, 2, -100], [-100, -100, -100]])


def log_probs(seed: int) -> torch.Tensor:
    return (-torch.rand(3, 3, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def loss_of(objective: str, num_tiers: int = 3, **settings) -> TierLoss:
    advantages_C = tier_advantages(None, num_tiers, "zscore")
    return TierLoss(OBJECTIVES[objective], advantages_C, **({"beta": 1.0, "gamma": 0.5} | settings))


def test_the_expert_rank_loss_by_hand():
    """Advantages 1 and -1; means over the tokens of the two rows with a response."""
    first, second = log_probs(1), log_probs(2)
    scores = TierScores(2, 3, {1: (first, LABELS), 2: (second, LABELS)})
    means = [(values[0].mean() + values[1, :2].mean()) / 2 for values in (first, second)]
    torch.testing.assert_close(loss_of("erl", num_tiers=2)(scores), -(means[0] - means[1]))


@pytest.mark.parametrize("objective", ["erl", "plackett_luce", "simpo"])
def test_passes_add_up_to_the_loss_and_to_its_gradient(objective):
    values = [log_probs(seed) for seed in (1, 2, 3)]
    loss = loss_of(objective)
    tiers = {tier: (values[tier - 1], LABELS) for tier in (1, 2, 3)}
    whole = loss(TierScores(3, 3, tiers))
    wanted = torch.autograd.grad(whole, values)
    numbers = {tier: (log_probs_BS.detach(), labels) for tier, (log_probs_BS, labels) in tiers.items()}
    # Only a sum over tiers does without what is to come.
    known = TierScores(3, 3, {} if objective == "erl" else {2: numbers[2], 3: numbers[3]})
    added, previous = [], None
    for tier in (1, 2, 3):
        scores = TierScores(3, 3, (previous or known).by_tier | {tier: tiers[tier]})
        added.append(loss.added(scores, previous))
        previous = scores.detached()
    torch.testing.assert_close(sum(added), whole)
    for gradient, true in zip(torch.autograd.grad(sum(added), values), wanted, strict=True):
        torch.testing.assert_close(gradient, true)


def test_a_floor_stops_low_tiers_alone():
    values = [log_probs(seed) for seed in (1, 2, 3)]
    scores = TierScores(3, 3, {tier: (values[tier - 1], LABELS) for tier in (1, 2, 3)})
    gradients = torch.autograd.grad(loss_of("erl", floor=0.0)(scores), values)
    assert gradients[0].any() and not gradients[2].any()


def test_without_responses_the_loss_is_0_and_still_has_a_graph():
    scores = TierScores(2, 3, {1: (log_probs(1), torch.full((3, 3), -100))})
    loss = loss_of("erl", num_tiers=2)(scores)
    assert loss == 0 and loss.requires_grad


def test_routers_that_got_other_tokens_are_refused():
    routing = [RouterOutput(torch.zeros(5, 4), None, torch.zeros(5, 2, dtype=torch.long))]
    with pytest.raises(OrdMoEConfigError, match=r"Routers got \[5\] tokens of rows with 6 positions"):
        mean_balance_loss(routing, torch.ones(2, 3), like=torch.zeros(()))
    assert mean_balance_loss([], torch.ones(2, 3), like=torch.zeros(())) == 0


def test_rows_and_tokens_without_a_label_are_not_counted():
    scores = TierScores(2, 3, {2: (torch.full((3, 3), -0.5), LABELS)})
    sums = tier_metrics(scores, end_ids=torch.tensor([2]), with_lengths=True)
    assert {name: (float(total), int(count)) for name, (total, count) in sums.items()} == {
        "tier_2/log_likelihood": (-1.0, 2),
        "tier_2/log_likelihood_no_eos": (-1.0, 2),
        "tier_2/response_length": (5.0, 3),
    }


def test_means_are_over_all_processes():
    accelerator = SimpleNamespace(device="cpu", reduce=lambda sums, reduction: sums + torch.tensor([[1, 3], [0, 0]]))
    assert means_over_processes({"a": (torch.tensor(3.0), 1), "b": (1, 0)}, accelerator) == {"a": 1.0}
