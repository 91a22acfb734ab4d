"""How much memory a pass takes, and how many tokens that leaves room for."""

import pytest
import torch

from ordmoe_peft.training.pass_memory import PassMemory, measured_passes, meter_of


MIB = 2**20


def zeros(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def test_the_peak_is_of_what_runs_in_the_block():
    with measured_passes(meter_of(torch.device("cpu")), [], missing_states=7) as memory:
        block = zeros(64)
        del block
    assert 60 * MIB < memory.peak < 128 * MIB
    assert memory.free > memory.peak
    assert memory.to_come == 7


@pytest.mark.parametrize("had_gradient", [False, True])
def test_gradients_that_the_block_makes_are_not_the_passes(had_gradient):
    """A pass makes a gradient of 64 MiB and gives it to the weight, and the next takes 64 MiB beside it."""
    weight = torch.nn.Parameter(torch.ones(16 * MIB))
    weight.grad = torch.ones_like(weight) if had_gradient else None
    with measured_passes(meter_of(torch.device("cpu")), [weight], missing_states=0) as memory:
        for _ in range(2):
            block = zeros(64)
            del block
            weight.sum().backward()
    assert memory.to_come == (0 if had_gradient else weight.nbytes)
    assert 60 * MIB < memory.peak < 100 * MIB
    again = memory.peak
    weight.sum().backward()  # nothing is counted any more
    assert memory.peak == again


def test_other_devices_are_not_measured():
    assert meter_of(torch.device("meta")) is None


@pytest.mark.parametrize(("to_come", "tokens"), [(0, 400), (20, 320), (100, 0), (150, 0)])
def test_most_of_the_room_is_for_a_batch(to_come, tokens):
    """100 tokens took 10 bytes tier by tier, so 20 on two tiers at once; 80 of 100 bytes are 400 tokens."""
    assert PassMemory(peak=10, free=100, to_come=to_come).max_tokens(tokens=100, num_passes=2) == tokens


def test_without_a_peak_there_is_no_room():
    assert PassMemory(free=100).max_tokens(tokens=10, num_passes=2) == 0
