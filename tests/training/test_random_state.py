"""A replayed forward draws what the first one drew, and leaves the draws around it alone."""

import torch

from ordmoe_peft.training.random_state import RandomState


def test_draws_are_those_after_the_state_was_taken():
    torch.manual_seed(0)
    state = RandomState.now(torch.device("cpu"))
    first = torch.rand(3)
    after = torch.get_rng_state()
    with state.replayed():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), after)
