import pytest
import torch

from ordmoe_peft.merging.delta_retention import DeltaRetention, RequantizationReport


def test_what_survived_by_hand():
    """W = 0, Δ = (3, 4), R = (3, 0): ⟨R, Δ⟩ / ‖Δ‖² = 9 / 25 and ‖R − Δ‖ / ‖Δ‖ = 4 / 5."""
    matrices = [map(torch.tensor, ([1.0], [4.0], [4.0])), map(torch.tensor, ([2.0], [6.0], [2.0]))]
    got = DeltaRetention.measure("w", matrices)
    assert got == DeltaRetention("w", delta_norm=5.0, survived=pytest.approx(0.36), noise=0.8)
    assert DeltaRetention.measure("w", []) == DeltaRetention("w", 0.0, 1.0, 0.0)


def test_only_weights_that_lost_their_delta_are_warned_of():
    kept, lost = DeltaRetention("kept", 1.0, 0.95, 0.1), DeltaRetention("lost", 1.0, 0.2, 0.9)
    assert RequantizationReport([kept]).warning() is None
    warning = RequantizationReport([kept, lost, DeltaRetention("also", 1.0, 0.5, 0.5)]).warning()
    assert "less than 90% of the delta in 2 of 3 weights, the least in lost: 20.0%" in warning
