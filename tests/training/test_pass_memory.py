"""How much memory a pass takes, and how many tokens that leaves room for."""

import torch

from ordmoe_peft.training.pass_memory import PassMemory, measured_passes


def test_the_peak_is_of_what_runs_in_the_block():
    with measured_passes(torch.device("cpu")) as memory:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        del block
    assert 60 * 2**20 < memory.peak < 128 * 2**20
    assert memory.free > memory.peak


def test_devices_that_cannot_be_measured_say_so():
    with measured_passes(torch.device("meta")) as memory:
        pass
    assert memory.max_tokens(tokens=10, num_passes=2) == 0


def test_half_of_free_memory_is_for_a_batch():
    """100 tokens took 10 bytes tier by tier; at once two tiers take 20, and 50 of 100 bytes are 250 tokens."""
    assert PassMemory(peak=10, free=100).max_tokens(tokens=100, num_passes=2) == 250
