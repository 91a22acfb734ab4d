from functools import partial
from math import log

import pytest
import torch

from ordmoe_peft.objectives.preference import dpo_loss, ipo_loss, logistic_loss, plackett_luce_loss, simpo_loss


# Chosen so that no pair of tiers, no sample and no margin repeats.
LIKELIHOOD = torch.tensor([[-0.5, -1.1, -2.0], [-1.7, -0.9, -1.3]], dtype=torch.float64)
REFERENCE = torch.tensor([[-0.8, -0.9, -1.0], [-1.0, -1.2, -1.5]], dtype=torch.float64)

LOSSES = {
    "logistic": partial(logistic_loss, beta=0.7),
    "plackett_luce": partial(plackett_luce_loss, beta=0.7),
    "dpo": partial(dpo_loss, reference_BC=REFERENCE, beta=0.7),
    "ipo": partial(ipo_loss, reference_BC=REFERENCE, beta=0.7),
    "simpo": partial(simpo_loss, beta=0.7, gamma=0.3),
}


def plain_pairs(score, term):
    """The mean of `term(score_j − score_k)` over samples and j < k, one by one."""
    tiers = range(score.shape[1])
    return torch.stack([term(row[j] - row[k]) for row in score for j in tiers for k in tiers if j < k]).mean()


def plain_plackett_luce(score):
    """The product of softmax probabilities of drawing the tiers in order, each from what is left."""
    drawn = [torch.stack([row[j:].softmax(0)[0] for j in range(len(row))]).prod() for row in score]
    return -torch.stack(drawn).log().mean()


PLAIN = {
    "logistic": lambda x: -torch.sigmoid(0.7 * (x[:, 0] - x[:, 2])).log().mean(),
    "plackett_luce": lambda x: plain_plackett_luce(0.7 * x),
    "dpo": lambda x: plain_pairs(x - REFERENCE, lambda margin: -torch.sigmoid(0.7 * margin).log()),
    "ipo": lambda x: plain_pairs(x - REFERENCE, lambda margin: (margin - 1 / 1.4) ** 2),
    "simpo": lambda x: plain_pairs(x, lambda margin: -torch.sigmoid(0.7 * margin - 0.3).log()),
}


def test_logistic_loss():
    """β(L̄_1 − L̄_3) = 2·½·ln 3 = ln 3, and σ(ln 3) = ¾; the reverse is ¼. The mean: −(ln ¾ + ln ¼)/2 = ½ ln(16/3)."""
    likelihood = torch.tensor([[0.0, 9.0, -log(3) / 2], [-log(3) / 2, -9.0, 0.0]])
    assert logistic_loss(likelihood, beta=2).item() == pytest.approx(log(16 / 3) / 2)


def test_plackett_luce_loss():
    """exp(βL̄) is 3, 2, 1: tier 1 first has probability 3/6, then tier 2 2/3, then tier 3 1. −ln(½ · ⅔) = ln 3."""
    likelihood = torch.tensor([[log(3) / 2, log(2) / 2, 0.0]])
    assert plackett_luce_loss(likelihood, beta=2).item() == pytest.approx(log(3))


def test_plackett_luce_loss_of_two_tiers_is_logistic():
    torch.testing.assert_close(plackett_luce_loss(LIKELIHOOD[:, :2], 0.7), logistic_loss(LIKELIHOOD[:, :2], 0.7))


def test_dpo_loss():
    """The gains over the base are ln 4, ln 2 and 0, so the pairs' margins are ln 2, ln 4 and ln 2.

    β = 1: σ is ⅔, ⅘ and ⅔, and the mean of −ln is −⅓ ln(⅔ · ⅘ · ⅔) = ⅓ ln(45/16). A base equal to the policy has no
    margins: ln 2.
    """
    gains = torch.tensor([[log(4), log(2), 0.0]])
    reference = torch.tensor([[-3.0, -5.0, -4.0]])
    assert dpo_loss(reference + gains, reference, beta=1).item() == pytest.approx(log(45 / 16) / 3)
    assert dpo_loss(reference, reference, beta=1).item() == pytest.approx(log(2))


def test_ipo_loss():
    """Target 1/(2·¼) = 2. The gains 3, 1, 0 have margins 2, 3 and 1: squares 0, 1 and 1, mean ⅔."""
    reference = torch.tensor([[-3.0, -5.0, -4.0]])
    gains = torch.tensor([[3.0, 1.0, 0.0]])
    assert ipo_loss(reference + gains, reference, beta=0.25).item() == pytest.approx(2 / 3)


def test_ipo_loss_is_minimal_at_its_target():
    """Two tiers, β = ¼: a margin of 2 has no gradient; at 3 the derivative by L̄_1 is 2(3 − 2) = 2."""
    at_target, beyond = (torch.tensor([[margin, 0.0]], requires_grad=True) for margin in (2.0, 3.0))
    for likelihood in (at_target, beyond):
        ipo_loss(likelihood, torch.zeros(1, 2), beta=0.25).backward()
    assert at_target.grad.tolist() == [[0.0, 0.0]]
    assert beyond.grad.tolist() == [[2.0, -2.0]]


def test_simpo_loss():
    """β = 2, γ = ln 2. Margins of L̄: ½ ln 2, ln 2, ½ ln 2. Inside σ: 0, ln 2 and 0, that is ½, ⅔ and ½.

    The mean: −⅓ ln(½ · ⅔ · ½) = ⅓ ln 6.
    """
    likelihood = torch.tensor([[log(2), log(2) / 2, 0.0]])
    assert simpo_loss(likelihood, beta=2, gamma=log(2)).item() == pytest.approx(log(6) / 3)


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_plain_formula(name):
    likelihood = LIKELIHOOD.clone().requires_grad_()
    loss, plain = LOSSES[name](likelihood), PLAIN[name](likelihood)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, likelihood)[0] for value in (loss, plain)))
    assert torch.autograd.gradcheck(LOSSES[name], likelihood)


@pytest.mark.parametrize("name", ["logistic", "plackett_luce", "simpo", "dpo"])
def test_tiers_out_of_order_cost_more(name):
    """Any exchange of two tiers that stand in order, and of the first and last for `logistic`, raises the loss."""
    loss = LOSSES[name] if name != "dpo" else partial(dpo_loss, reference_BC=torch.zeros(1, 3), beta=0.7)
    ordered = torch.tensor([[-0.5, -1.0, -2.0]])
    for swapped in ([2, 1, 0], *([] if name == "logistic" else [[1, 0, 2], [0, 2, 1]])):
        assert loss(ordered) < loss(ordered[:, swapped])


def test_ipo_loss_charges_a_swap():
    """Target 2: margins 2 and −2 cost 0 and 16."""
    ordered, reference = torch.tensor([[0.0, -2.0]]), torch.zeros(1, 2)
    assert ipo_loss(ordered, reference, beta=0.25).item() == 0
    assert ipo_loss(ordered.flip(-1), reference, beta=0.25).item() == 16


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("likelihood", [[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [-1e4, -1e4, -1e4]])
def test_extreme_likelihoods_stay_finite(name, likelihood):
    """Where σ is 0 or 1 in float32, the logarithm of it must still have its value and slope."""
    likelihood = torch.tensor([likelihood] * 2, requires_grad=True)
    loss = LOSSES[name](likelihood)
    loss.backward()
    assert loss.isfinite() and likelihood.grad.isfinite().all()


def test_extreme_disorder_keeps_its_full_slope():
    """−log σ(−x) → x: at L̄ of −1e4 and 1e4 with β = 1 the loss is 2e4, and its derivatives are −1 and 1."""
    for loss in (logistic_loss, plackett_luce_loss, partial(simpo_loss, gamma=0.0)):
        likelihood = torch.tensor([[-1e4, 1e4]], requires_grad=True)
        value = loss(likelihood, beta=1)
        value.backward()
        assert value.item() == 2e4
        assert likelihood.grad.tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    likelihood = LIKELIHOOD.bfloat16()
    loss = LOSSES[name](likelihood)
    assert loss.dtype != torch.bfloat16
    torch.testing.assert_close(loss.float(), LOSSES[name](likelihood.double()).float())


@pytest.mark.parametrize("name", LOSSES)
def test_one_tier_is_no_order(name):
    with pytest.raises(AssertionError, match="two tiers"):
        LOSSES[name](LIKELIHOOD[:, :1])
